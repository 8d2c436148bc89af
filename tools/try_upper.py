"""Upper references, which are no merges: EMR-Merging and Twin-Merging give each task something of its own.

As `tools/try_residual.py`, with the body before fine-tuning as base; no rows are needed:
  FISHER_NODES_GLUE=DIR python tools/try_upper.py CHECKPOINTS --base BODY --out nbs/results/best/upper.json
"""
from copy import deepcopy
from functools import partial

from fisher_nodes.core.families import body_of
from fisher_nodes.merging.run import load_base
from fisher_nodes.methods.upper import emr_states, twin_states
from try_residual import Study, make_parser, open_study

RANKS = .05, .1, .2 # shares of the singular values that a task keeps; the paper has .1

def scored(study, found):
    "Scores of the tasks' own bodies, and what each task needs for itself, in percent of a body's bits."
    out = {}
    for t, state in found.states.items():
        body = deepcopy(body_of(study.models[t]))
        body.load_state_dict(state, strict=False)
        one = Study.score(study.only(t), body, {})[t]
        whole = sum(8*o.nbytes for o in state.values())
        out[t] = one | dict(extra_percent=100*found.extra_bits[t]/whole)
    return out

class Upper(Study):
    def only(self, task):
        new = object.__new__(Upper)
        new.points = {task: self.points[task]}
        return new

def run_group(base, study):
    "Both, by name."
    given = load_base(base, study.models[study.tasks[0]])
    states = {t: {n: p for n, p in body_of(m).named_parameters() if n in given} for t, m in study.models.items()}
    base = {n: given[n] for n in states[study.tasks[0]]}
    found = {'emr': scored(study, emr_states(states, base))}
    for r in RANKS: found[f'twin, rank share {r}'] = scored(study, twin_states(states, base, rank_share=r))
    return found

if __name__=='__main__':
    parser = make_parser(__doc__)
    parser.add_argument('--base', required=True)
    open_study(parser, Upper, partial(run_group, parser.parse_args().base))
