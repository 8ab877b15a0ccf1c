"""Risk: the key of a server is shown to whoever reads its log, its command or /server_info, or is not asked
for.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from server import clean_environment, kt_options

from kt_kernel.errors import ConfigurationError
from kt_kernel.integrations.sglang import access

PROGRAM = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang.srt.entrypoints import engine, http_server
from sglang.srt.sampling.watermarking.core import redact_watermark_secrets
from kt_kernel.integrations.sglang import access
from kt_kernel.integrations.sglang.settings import SETTINGS_ATTRIBUTE
arguments = prepare_server_args(sys.argv[1:])
shown = engine._server_args_for_logging(arguments)
state = {"internal_states": [{"api_key": arguments.api_key}], "command": arguments.launch_command}
setattr(arguments, SETTINGS_ATTRIBUTE, object())
access.close_to_web_pages(arguments)
middleware = http_server.app.user_middleware
cors = [entry.kwargs["allow_origins"] for entry in middleware if "CORS" in entry.cls.__name__]
print(json.dumps([arguments.api_key, str(shown), str(redact_watermark_secrets(state)), cors]))
"""


def shown(model, *options: str, **environment: str) -> list:
    """The key that the server asks for, its arguments in the log, parts of /server_info, and the origins."""
    command = ["-c", PROGRAM, "--model-path", str(model), *kt_options(model), "--dtype", "float32", *options]
    done = subprocess.run(
        [sys.executable, *command],
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("given", ["option", "file"])
def test_the_key_is_asked_for_and_shown_nowhere(tiny_checkpoint, tmp_path, given):
    file = tmp_path / "key"
    file.write_text("a-very-secret-key\n")
    options = ("--api-key", "a-very-secret-key") if given == "option" else ()
    environment = {
        "option": {"KT_ALLOW_ORIGINS": "https://a.org, https://b.org"},
        "file": {"KT_API_KEY_FILE": str(file)},
    }[given]
    key, *texts, origins = shown(tiny_checkpoint("qwen3_moe"), *options, **environment)
    assert key == "a-very-secret-key"
    for text in texts:
        assert "a-very-secret-key" not in text and "'api_key': '<redacted>'" in text
    assert origins == ([["https://a.org", "https://b.org"]] if given == "option" else [])


def test_the_environment_gives_a_key_or_a_file_with_one(monkeypatch, tmp_path):
    monkeypatch.delenv("KT_API_KEY_FILE", raising=False)
    monkeypatch.setenv("KT_API_KEY", "from the environment")
    assert access.key_of_environment() == "from the environment"
    (tmp_path / "key").write_text("")
    monkeypatch.setenv("KT_API_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(ConfigurationError, match="has no line, or several; expected one"):
        access.key_of_environment()
    monkeypatch.setenv("KT_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match=r"none \(KT_API_KEY_FILE\), cannot be read"):
        access.key_of_environment()
