"""The short form of tests/campaign.py: killed again and again, and bit for bit the run that nobody disturbed."""

import pytest
from campaign import campaign


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(1, 3), (2, 3)])
def test_killed_again_and_again(processes, kills, tmp_path):
    same, came = campaign(processes, kills, seed=0, folder=tmp_path)
    assert same, came
    assert sum(came.values()) == kills and {"a save", "evaluation"} <= came.keys(), came
