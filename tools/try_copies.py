"""What residual regression gains by copies of its rows with replaced tokens, and by heads fitted on all rows.

As `tools/try_residual.py`, on the same rows; an interrupted run goes on where it was. Minutes a group on a core:
  FISHER_NODES_GLUE=DIR python tools/try_copies.py CHECKPOINTS --out nbs/results/best/copies.json
"""
from fisher_nodes.methods import replaced
from fisher_nodes.methods.calls import split_calls
from try_residual import Study, make_parser, open_study, total

CHOICES = { # name -> share kept apart, copies, share of tokens replaced, whether heads see all rows
    'a quarter kept, heads on it': (.25, 0, 0, False),
    'a quarter kept, heads on all rows': (.25, 0, 0, True),
    '0.15 kept, heads on all rows': (.15, 0, 0, True),
    'and one copy': (.15, 1, .15, True),
    'and three copies': (.15, 3, .15, True),
    'and three copies, 30% replaced': (.15, 3, .3, True),
    'nothing kept, heads on all rows, three copies': (0, 3, .15, True)}

def with_copies(rows, copies, share):
    "Every task's rows, and their copies."
    default, replaced.REPLACED = replaced.REPLACED, share
    try: return {t: replaced.with_replaced(o, copies) for t, o in rows.items()}
    finally: replaced.REPLACED = default

def run_group(study):
    "Every choice, by its name."
    found = {}
    for name, (kept, copies, share, every) in CHOICES.items():
        first, last = zip(*(split_calls(o, kept) for o in study.calls.values()))
        body = study.body(with_copies(dict(zip(study.tasks, first)), copies, share))
        sums = study.sums(body, study.calls if every else dict(zip(study.tasks, last)))
        found[name] = study.score(body, {t: total(o).moves() for t, o in sums.items()})
    return found

if __name__ == '__main__': open_study(make_parser(__doc__), Study, run_group)
