"""What the parser complains of becomes one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdft.messages import check_yaml, clear_message

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'sdft.student.StudentModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'sdft.SDFTModule':
        Option 'temprature' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'temprature': 2}"""

NUMBER = """Parser key "trainer.gradient_clip_val":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'float'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'float'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: nan"""

RAISED = """Does not validate against any of the Union subtypes
Subtypes: [<class 'sdft.data.ContinualDataModule'>, <class 'NoneType'>]
Errors:
  - data.tasks is empty: give at least one task
  - Expected a <class 'NoneType'>
Given value type: <class 'jsonargparse._namespace.Namespace'>
Given value: Namespace(class_path='sdft.ContinualDataModule', init_args=Namespace(tasks=[]))"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            NESTED,
            "model: sdft.SDFTModule: there is no option 'temprature' (did you mean 'temperature'?)",
        ),
        (
            NUMBER,
            "trainer.gradient_clip_val: must be a whole number or must be a number, found nan",
        ),
        (RAISED, "data.tasks is empty: give at least one task"),
        (
            "Parser key \"teacher.kind\":\n  Expected a typing.Literal['ema', 'frozen']. "
            "Got value: emaa",
            "teacher.kind: must be one of 'ema', 'frozen', found emaa",
        ),
        ("a message of our own: nothing to do", "a message of our own: nothing to do"),
    ],
)
def test_clear_message(text: str, expected: str) -> None:
    assert clear_message(text) == expected


def test_check_yaml_names_file_and_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("data:\n  steps: 3\nmodel: [open\n")
    with pytest.raises(ValueError, match=r"broken\.yaml, line 4, column 1: no valid YAML"):
        check_yaml(broken)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text"])
def test_check_yaml_wants_a_mapping(tmp_path: Path, content: str) -> None:
    file = tmp_path / "list.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"list\.yaml: expected keys and values"):
        check_yaml(file)


def test_check_yaml_wants_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.yaml: not UTF-8 at byte 9"):
        check_yaml(file)


def test_check_yaml_accepts_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "fine.yaml"
    file.write_text("data: {steps: 3}\n")
    check_yaml(file)
