"""The guards that `make mutants` takes out one by one stand where taking them out changes something."""

from pathlib import Path

import mutants
import pytest
from mutants import ROOT, Mutant


def test_every_guard_stands_once_in_what_counts_and_its_test_is_there() -> None:
    wrong = []
    for mutant in mutants.guards():
        path, _, name = mutant.test.partition("::")
        if f"def {name.partition('[')[0]}(" not in (ROOT / path).read_text():
            wrong.append(f"{mutant.test} is no test")
        try:
            mutants.look_up(mutant, ROOT)
        except ValueError as error:
            wrong.append(str(error))
    assert wrong == []


def test_a_guard_in_a_function_that_was_defined_anew_is_told(tmp_path: Path) -> None:
    old = "create function f() returns int as $$ select 1 $$;\ncreate function g() returns int as $$ select 2 $$;\n"
    (tmp_path / "0001_a.sql").write_text(old)
    (tmp_path / "0002_b.sql").write_text(
        "create or replace function f() returns int as $$ select 3 $$;\n"
    )
    mutants.look_up(Mutant("once", "0001_a.sql", "select 2", "", ""), tmp_path)
    mutants.look_up(Mutant("once", "0002_b.sql", "select 3", "", ""), tmp_path)
    with pytest.raises(ValueError, match=r"f of 0001_a\.sql is another in 0002_b\.sql"):
        mutants.look_up(Mutant("once", "0001_a.sql", "select 1", "", ""), tmp_path)
    with pytest.raises(ValueError, match="2 times, not once"):
        mutants.look_up(Mutant("once", "0001_a.sql", "returns int", "", ""), tmp_path)
