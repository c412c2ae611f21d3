# SPDX-License-Identifier: Apache-2.0
"""Messages that name the user's files in place of temporary ones."""

import threading

import pytest

from hmf.errors import HmfError, naming_config, notice, standing_for, unknown_name


class Kind(HmfError):
    pass


def test_an_error_keeps_its_kind_and_its_text(tmp_path):
    with pytest.raises(Kind) as caught, naming_config("base"), standing_for(tmp_path, "user"):
        raise Kind(f"config.json: rope: as in {tmp_path}/a and https://arxiv.org/abs/1//2") from ValueError("why")
    assert str(caught.value) == "base/config.json: rope: as in user/a and https://arxiv.org/abs/1//2"
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_block_of_another_thread_changes_no_message(capsys):
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with standing_for("/tmp/work", "other"):
            entered.set()
            left.wait(10)
            notice("of a thread: /tmp/work")

    with standing_for("/tmp/work", "mine"):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(10)
        notice("of the test: /tmp/work")
    left.set()
    thread.join()
    assert capsys.readouterr().err.splitlines() == ["hmf: of the test: mine", "hmf: of a thread: other"]


def test_an_unknown_name_is_told_a_readable_number_of_valid_ones():
    known = [f"task_{number}" for number in range(5000)]
    assert unknown_name("task", "x", ["b", "a"]) == "unknown task 'x'; valid: a, b"
    assert unknown_name("task", "?", known).endswith(" and 4,960 more")
