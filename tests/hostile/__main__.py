"""`python -m tests.hostile --sets 10000`: how many fits break a law without saying so."""

from __future__ import annotations

import argparse
import re
import sys
import time

from .measure import WAYS, added, batches, cells, describe, forget, measure, table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--sets", type=int, default=10_000)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--way", default="", help="only those whose name this regular expression finds")
parser.add_argument("--show", type=int, default=3, help="fits of each law broken")
options = parser.parse_args()

begin = time.time()
ways = [way for way in WAYS if re.search(options.way, way.name)]
each = -(-options.sets // len(ways))
count = None
for way in ways:
    found = measure(batches(each, options.seed, cells([way])))
    count = found if count is None else added(count, found)
    forget()  # a program of each way is memory that no other needs
    print(f"{time.time() - begin:.0f} s: {way.name}", file=sys.stderr, flush=True)
print(table(count))
for law, fits in count.worst.items():
    for by, fit in sorted(fits, key=lambda one: -abs(one[0]))[: options.show]:
        print("-", describe(fit, law, by))
print(f"{time.time() - begin:.0f} s")
