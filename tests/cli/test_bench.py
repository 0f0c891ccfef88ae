"""`aurora-rl bench`: which benches there are."""

from __future__ import annotations

import pytest

from aurora_rl.cli.main import main


def test_help_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "adaptation" in told and "objectives" in told
