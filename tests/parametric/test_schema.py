"""The tables of a store, and the number that stands for them."""

from __future__ import annotations

from hybrid_sleep.parametric.store import FactStore

BASE = "0" * 64


def test_the_schema_is_the_one_that_this_version_number_stands_for(tmp_path):
    store = FactStore.open(tmp_path / "facts", BASE, model="small")
    found = dict(
        store._db.execute(
            "SELECT name, group_concat(column, ' ') FROM (SELECT m.name, p.name AS column FROM "
            "sqlite_master m, pragma_table_info(m.name) p WHERE m.type = 'table') GROUP BY name"
        )
    )
    assert found == {
        "audits": "id time fact_id commit_id results",
        "changes": "commit_id fact_id before after",
        "commits": "id parent kind time status digest file file_digest behind weights "
        "weights_digest learned effective report",
        "derived": "path source_id doomed",
        "edits": "fact_id commit_id site diagnostics",
        "erased": "id erasure_id source digest",
        "erasures": "id time count",
        "experiences": "id source_id kind state commit_id created weights surprise importance "
        "worth tokens size body signature",
        "facts": "id subject relation object subject_key relation_key version state created source "
        "span_start span_end supersedes",
        "meta": "name value",
        "progress": "name value",
        "relations": "key words",
        "sources": "id key name",
        "tallies": "source_id what count",
    }
    assert store._db.execute("PRAGMA user_version").fetchone() == (2,)
    assert store.meta.keys() == {"base", "model", "created"} and store.meta["model"] == "small"
    assert store.base == BASE
    store.close()
