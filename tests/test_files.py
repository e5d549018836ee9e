import json
import os

import pytest

from minisaobp.files import append_json, write_json, write_whole


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def fails(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_whole(path, fails)
    assert json.loads(path.read_text()) == {"x": 1} and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(ValueError):  # JSON has no NaN
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_said_with_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_json("/dev/full", {})


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
