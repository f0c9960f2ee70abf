"""docs/posthoc.md: every router stands in its tables with its paper, and none that there is not."""

import re
from pathlib import Path

from molora.posthoc.registry import posthoc_routers

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "posthoc.md"


def test_the_tables_list_every_router():
    rows = re.findall(r"^\| `(\w+)` \| .+\|$", PAGE.read_text(encoding="utf-8"), re.M)
    own = [name for name in posthoc_routers if posthoc_routers.get(name).__module__.startswith("molora.")]
    assert len(own) > 10 and sorted(rows) == own
