"""higher on pruned models.

Nothing has to be added: a masked weight is a property of its module's class, which higher's
functional copy inherits, so plain ``higher.innerloop_ctx`` and ``higher.monkeypatch`` carry the
masks exactly (``tests/hosts/test_higher.py``). They are named here so that a loop can say that it
relies on this.
"""

try:
    from higher import innerloop_ctx, monkeypatch
except ImportError as error:
    raise ImportError(f'{error}; this needs: pip install "l2l-prune[higher]"') from None

__all__ = ["innerloop_ctx", "monkeypatch"]
