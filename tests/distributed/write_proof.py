"""Write the proof of expert parallelism as a page of docs/results: every cell, the breaks, the random cases.

    python tests/distributed/write_proof.py docs/results/DATE-expert-parallel-proof.md

About five minutes on two idle cores; exit status 1 if anything is not proven.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from cover import Cell, table
from pool import Pool
from test_cover import BREAKS, CANDIDATES, COVER, COVER_OF_SIX, SQUARE, STEPS, prove, prove_broken, prove_single
from test_random_cases import CASES, CHUNK, faults_of

from swinmoe.runtime import describe_environment
from swinmoe.verify import ParallelProof

Item = TypeVar("Item")
Result = tuple[Cell, ParallelProof, ParallelProof]


def main(path: Path) -> int:
    """Run everything, write the page."""
    torch.set_num_threads(1)
    began = time.monotonic()
    pools = {world: Pool(world) for world in (2, 4, 6)}
    try:
        cover, six = ([_prove(cell, pools) for cell in _tell(cells)] for cells in (COVER, COVER_OF_SIX))
        breaks = {name: pools[4].run(prove_broken, name, SQUARE, 1)[0] for name in _tell(list(BREAKS))}
        different, spent = [], {}
        for world in (2, 4):
            start = time.monotonic()
            for first in _tell(list(range(0, CASES // 2, CHUNK))):
                answers = pools[world].run(faults_of, list(range(first, first + CHUNK)), world)
                different += [fault for answer in answers for fault in answer]
            spent[world] = time.monotonic() - start
    finally:
        for pool in pools.values():
            pool.close()
    path.write_text(page(cover, six, breaks, different, spent, time.monotonic() - began), encoding="utf-8")
    good = all(proof.proven for _, proof, _ in cover + six) and not different
    return 0 if good and all(proof.proven == (name == "none") for name, proof in breaks.items()) else 1


def _prove(cell: Cell, pools: dict[int, Pool]) -> Result:
    if cell.processes == 1:
        return cell, prove(cell), prove_single(cell)
    pool = pools[cell.processes]
    return cell, pool.run(prove, cell)[0], pool.run(prove_single, cell)[0]


def _tell(items: Sequence[Item]) -> Iterator[Item]:
    """`items`, saying how far it is."""
    for number, item in enumerate(items):
        print(f"{number + 1}/{len(items)} {item}", file=sys.stderr)
        yield item


def page(
    cover: Sequence[Result],
    six: Sequence[Result],
    breaks: dict[str, ParallelProof],
    different: Sequence[str],
    spent: dict[int, float],
    seconds: float,
) -> str:
    """The page in markdown."""
    environment = describe_environment()
    results = [*cover, *six]
    proven = sum(proof.proven for _, proof, _ in results)
    claims = [cell for cell, _, _ in results if cell.drops]
    clipped = sum(proof.largest_clip_factor < 1 for _, proof, _ in results)
    staged = sum(cell.two_stages for cell, _, _ in results)
    dropping = sum(proof.dropped > 0 for cell, proof, _ in results if cell.drops)
    worst = max(proof.worst_gradient[1] for _, proof, _ in results)
    single = max(proof.worst_gradient[1] for _, _, proof in results)
    lines = [
        "# Expert parallelism against one process",
        f"{datetime.date.today()}. {os.cpu_count()}-core CPU, torch {torch.__version__}, gloo; commit "
        f"{environment['git_commit']}. `python tests/distributed/write_proof.py PATH`, {seconds:.0f} s.",
        "",
        f"{proven} of {len(results)} cells proven: {len(cover)} of one, two and four processes, a pairwise cover of",
        f"the {CANDIDATES} that have a meaning, and {len(six)} of six processes; every way to travel meets every mesh",
        f"and both layouts. {staged} exchange in two stages, on 2 or 3 nodes of 2 or 3 ranks: 2DH with one node, or",
        "one rank per node, is no cell. Each trains a Swin-MoE of one",
        f"block, D 12, for {STEPS} clipped AdamW steps on 3 images of 4 tokens per rank, shared out equally and not,",
        "and is held against one process with the oracle's expert layer on the same global batch, step by step.",
        "",
        f"Largest gradient difference, of the model's largest gradient: {worst:.1e} in float64 (bound 1e-9),",
        f"{single:.1e} in float32 over two steps. {dropping} of the {len(claims)} cells that claim drops had them,",
        f"{clipped} of {len(results)} were clipped at every step,",
        f"and in {sum(proof.bit_equal for _, proof, _ in results)} what ranks share stayed bit-equal over all steps.",
        "",
        "## One, two and four processes",
        "Columns: data-parallel x expert-parallel ranks; experts in all; what travels; 2DH as nodes x ranks;",
        "differences from one process, the largest over parameters, steps (gradients before clipping, of max\\|g\\|;",
        "parameters after the last step, of max\\|p\\|); choices dropped of all; the smallest and the largest factor",
        "of clipping.",
        "",
        table(cover),
        "",
        "## Six processes, nodes of 2 x 3 and 3 x 2",
        table(six),
        "",
        "## Deliberate breaks",
        f"Cell: {SQUARE}; one step.",
        "",
        "| break | verdict |",
        "|---|---|",
        *(f"| {name} | {'proven' if proof.proven else '; '.join(proof.failures)} |" for name, proof in breaks.items()),
        "",
        "## Random cases",
        f"{CASES} layers, meshes and token counts on two and four processes, each run two ways: {len(different)} "
        f"differences above 1e-10; {spent[2]:.0f} s and {spent[4]:.0f} s.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} PATH")
    sys.exit(main(Path(sys.argv[1])))
