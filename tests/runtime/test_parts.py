"""What a killed attempt leaves for the next one, whole or damaged."""

import pytest

from trace_ray.runtime.parts import Parts


def test_work_is_done_once_and_again_where_what_was_kept_is_damaged(tmp_path, caplog):
    parts, done = Parts(str(tmp_path / "parts")), []

    def work():
        done.append(1)
        return {"n": len(done)}

    assert parts.once("sum", work) == parts.once("sum", work) == {"n": 1}
    (tmp_path / "parts" / "sum.json").write_bytes(b'{"n": ')
    assert parts.once("sum", work) == parts.once("sum", work) == {"n": 2}
    assert "sum.json is damaged" in caplog.text


@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_kept_folder_that_is_damaged_counts_as_none(tmp_path, caplog, left):
    parts, folder = Parts(str(tmp_path / "parts")), tmp_path / "kept"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w" * 50_000)
    assert not parts.restore("fit", tmp_path / "none")
    parts.keep("fit", folder)
    assert parts.restore("fit", tmp_path / "whole")
    assert (tmp_path / "whole" / "weights").read_bytes() == b"w" * 50_000
    archive = tmp_path / "parts" / "fit.tar"
    archive.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * left)])
    assert not parts.restore("fit", tmp_path / "half")
    assert not (tmp_path / "half").exists()
    assert "fit.tar is damaged" in caplog.text
