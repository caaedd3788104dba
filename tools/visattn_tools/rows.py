"""Rows of results as text."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any


def json_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON."""
    return json.dumps(rows, indent=2) + "\n"


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV; columns are the keys of any row but those that hold lists or more rows."""
    plain = [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in plain for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue()
