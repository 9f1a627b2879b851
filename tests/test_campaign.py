"""The short form of tests/campaign.py: killed again and again, and bit for bit the run that nobody disturbed."""

import pytest
from campaign import campaign


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    kills = 3
    same, came = campaign(1, kills, seed=0, folder=tmp_path)
    assert same, came
    assert sum(came.values()) == kills and {"a save", "evaluation"} <= came.keys(), came
