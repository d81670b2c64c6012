"""A setting is written once: its field says its type, default, range and help text.

Checks, the options of the command and the keys of a sweep's TOML file all come from the fields of
:class:`~l2l_prune.experiments.config.RunConfig` and
:class:`~l2l_prune.experiments.config.Phases`.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from l2l_prune._basics import checks


@dataclass(frozen=True)
class Setting:
    """What a setting may be, besides its type.

    Attributes:
        help: What it means, in one line.
        least: Smallest value of a whole number.
        above: A number must be larger than this; without it, the number must be >= 0.
        share: Whether it is a number in [0, 1).
        choices: The names that it may take.
        shown: Its default in words, where it depends on other settings.
        panel: The panel of ``--help`` that lists it.
    """

    help: str
    least: int | None = None
    above: float | None = None
    share: bool = False
    choices: tuple[str, ...] = ()
    shown: str | None = None
    panel: str = "Settings"

    def check(self, name: str, value: object, kind: type) -> None:
        """Refuse a value that no run could use.

        Args:
            name: The setting's name, for messages.
            value: What it is set to.
            kind: Its type.

        Raises:
            TypeError: If the value has the wrong type.
            ValueError: If it is out of range, or an unknown name.
        """
        if kind is bool:
            checks.true_or_false(name, value)
        elif kind is int:
            checks.whole_number(name, value, self.least or 0)  # type: ignore[arg-type]
        elif kind is float and self.share:
            checks.fraction(name, value)
        elif kind is float:
            checks.number(name, value, above=self.above)
        elif self.choices:
            checks.one_of(name, value, self.choices)
        else:
            checks.of_type(name, value, str, "a string")


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A field of a dataclass that is a setting; ``rules`` are those of :class:`Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **rules)})


def settings_of(owner: type) -> dict[str, tuple[Setting, type, bool]]:
    """The settings of a dataclass: each with its type, and whether it may be ``None``."""
    hints = typing.get_type_hints(owner)
    found = {}
    for field in dataclasses.fields(owner):
        if "setting" in field.metadata:
            kinds = [hints[field.name]]
            if isinstance(kinds[0], types.UnionType):
                kinds = list(typing.get_args(kinds[0]))
            optional = type(None) in kinds
            [kind] = [k for k in kinds if k is not type(None)]
            if typing.get_origin(kind) is typing.Literal:
                kind = str
            found[field.name] = (field.metadata["setting"], kind, optional)
    return found


def check_settings(settings: object) -> None:
    """Check each setting, and refuse values that no run could use.

    Args:
        settings: An instance of a dataclass with fields made by :func:`setting`.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or an unknown name.
    """
    for name, (rules, kind, optional) in settings_of(type(settings)).items():
        value = getattr(settings, name)
        if value is not None or not optional:
            rules.check(name, value, kind)


def takes_settings(
    *owners: type, own: Mapping[str, str] | None = None, hidden: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each setting of some dataclasses.

    The command gets all of them as keyword arguments; those that were not given are ``None``, which
    keeps their default.

    Args:
        *owners: The dataclasses.
        own: Further names of an option, by setting.
        hidden: Settings that the command refuses with a reason, and which its help leaves out.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        given = [
            p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        names = {p.name for p in given}
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_option(name, owner, (own or {}).get(name), name in hidden),
            )
            for owner in owners
            for name in settings_of(owner)
            if name not in names
        ]
        given = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in given]
        command.__signature__ = signature.replace(parameters=given + options)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in given + options}
        return command

    return add


def _option(name: str, owner: type, also: str | None, hidden: bool) -> Any:
    rules, kind, _ = settings_of(owner)[name]
    [field] = [f for f in dataclasses.fields(owner) if f.name == name]
    help_text = rules.help
    if rules.choices:
        help_text = f"{help_text.rstrip('.')}: {', '.join(rules.choices)}."
    dashed = "--" + name.replace("_", "-")
    names = [dashed] if kind is not bool else [f"{dashed}/--no-{dashed[2:]}"]
    shown = str(field.default) if rules.shown is None else rules.shown
    if kind is bool and rules.shown is None:
        shown = dashed[2:] if field.default else f"no-{dashed[2:]}"
    option = typer.Option(
        *([*names, also] if also else names),
        help=help_text,
        min=rules.least,
        show_default=shown,
        rich_help_panel=rules.panel,
        hidden=hidden,
    )
    plain = kind if kind in (int, float, bool) else str
    return Annotated[plain | None, option]
