"""benchmark.speed.scaling on one process; the bytes of two are compared in tests/trainer_utils/test_sharding.py."""
from benchmark.speed import scaling


def test_one_process_sends_nothing(capsys):
    result = scaling.main(["--steps", "1", "--images", "8"])
    assert result["bytes"] == result["predicted_bytes"] == result["communication_share"] == 0
    assert "1 processes, sharding none" in capsys.readouterr().out and result["images_per_sec"] > 0
