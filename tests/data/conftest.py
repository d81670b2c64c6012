from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _glyph_cache(tmp_path_factory):
    """One rendering for all tests, apart from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2L_PRUNE_CACHE", str(tmp_path_factory.mktemp("glyphs")))
        yield
