"""Risk: everybody on the machine reads the key of a server, or a server runs without the key it was given."""

from __future__ import annotations

import pytest

from kt_kernel.cli.exposure import exposure_warning
from kt_kernel.cli.server_key import has_key, without_key


@pytest.mark.parametrize(
    ("options", "kept", "environment"),
    [
        (["--port", "1"], ["--port", "1"], {}),
        (["--api-key", "k", "--port", "1"], ["--port", "1"], {"KT_API_KEY": "k", "KT_API_KEY_FILE": ""}),
        (["--port", "1", "--api-key=k"], ["--port", "1"], {"KT_API_KEY": "k", "KT_API_KEY_FILE": ""}),
        (["--api-key=k", "--port", "1"], ["--port", "1"], {"KT_API_KEY": "k", "KT_API_KEY_FILE": ""}),
        (["--api-key-file", "/f", "-x"], ["-x"], {"KT_API_KEY_FILE": "/f"}),
        (["--api-key-file=/f"], [], {"KT_API_KEY_FILE": "/f"}),
        (["--api-key", "a", "--api-key", "b", "-x"], ["-x"], {"KT_API_KEY": "b", "KT_API_KEY_FILE": ""}),
        (["--admin-api-key", "k"], ["--admin-api-key", "k"], {}),
    ],
)
def test_the_key_goes_through_the_environment(options, kept, environment):
    assert without_key(options) == (kept, environment)


def test_a_key_from_anywhere_is_a_key():
    assert has_key({"KT_API_KEY": "k"}) and has_key({"KT_API_KEY_FILE": "/f"})
    assert not has_key({"KT_API_KEY": "", "KT_API_KEY_FILE": ""}) and not has_key({})
    assert exposure_warning("0.0.0.0", has_key({"KT_API_KEY_FILE": "/f"})) is None
