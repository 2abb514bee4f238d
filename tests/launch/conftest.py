"""Launch scripts called in this process."""

import pytest

from tests.launch import launched


@pytest.fixture
def call(capsys):
    """call(script, *arguments): its main() in this process with these flags; what it printed."""

    def run(script, *arguments):
        launched.run(script, *arguments)
        return capsys.readouterr().out

    return run
