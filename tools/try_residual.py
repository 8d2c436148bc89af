"""What was tried around residual regression: shares of rows for heads, their ridge, that of the body, folds.

Scores and divergences of some groups of GLUE checkpoints with every choice, at one N; an interrupted run goes on
where it was. Minutes a group on a core:
  FISHER_NODES_GLUE=DIR python tools/try_residual.py CHECKPOINTS --out nbs/results/best/tried.json
"""
import argparse
import json
import warnings
from copy import deepcopy
from pathlib import Path

import torch
from fisher_nodes.core.families import body_of
from fisher_nodes.engine.files import write_record
from fisher_nodes.engine.measure import measure
from fisher_nodes.experiment.grid import load_checkpoint
from fisher_nodes.methods import residual
from fisher_nodes.methods.average import average_model
from fisher_nodes.methods.calls import Calls, split_calls
from fisher_nodes.methods.method import Job
from fisher_nodes.methods.refit import HeadSums, head_folds, last_linear

GROUPS = 'mnli+qqp', 'mnli+rte', 'sst2+qnli', 'mnli+qqp+qnli+sst2+mrpc+rte'
RIDGES = .01, .03, .1, .3, 1., 3.
FOLDS = 4

def joined(parts):
    "Several lots of examples as one."
    values, n, seen = {}, 0, 0
    for o in parts:
        for name, v in o.values.items():
            i, what = name.split('.', 1)
            values[f'{seen+int(i)}.{what}'] = v
        seen, n = seen+len(o.calls), n+o.num_examples
    return Calls(values, n)

def dealt(calls):
    "Examples in folds."
    out, rest = [], calls
    for k in range(FOLDS, 1, -1):
        rest, last = split_calls(rest, 1/k)
        out.append(last)
    return [*out, rest]

class Study:
    "One group of checkpoints."
    def __init__(self, tasks, checkpoints, calls):
        self.tasks, self.points, self.calls = tasks, {t: checkpoints[t] for t in tasks}, {t: calls[t] for t in tasks}
        self.models = {t: o.model for t, o in self.points.items()}
        self.names = {t: last_linear(m, calls[t].calls[0]) for t, m in self.models.items()}

    def body(self, rows, ridge=.1, targets='sums'):
        "The body that is fitted to some rows."
        states = {t: dict(body_of(m).named_parameters()) for t, m in self.models.items()}
        job = Job(states, torch.ones(len(states)).double(), rows, model=self.models[self.tasks[0]], models=self.models)
        model = average_model(job).eval()
        residual.fit_body(model, residual.make_lanes(job, model), ridge, targets)
        return body_of(model)

    def sums(self, body, rows):
        "What heads lack on a body, in folds, by task."
        return {t: head_folds(m, body, rows[t], self.names[t]) for t, m in self.models.items()}

    def score(self, body, moves):
        "Accuracy relative to the own model's in percent, and KL, by task."
        out = {}
        for t, c in self.points.items():
            own, labels = c.own_answers().double().log_softmax(1), c.labels
            new = deepcopy(c.model)
            setattr(new, new.base_model_prefix, body)
            if moves.get(t):
                m = new.get_submodule(self.names[t])
                for p, o in zip((m.weight, m.bias), moves[t]): p.add_(o.to(p))
            said = c.answers(new)[0].double().log_softmax(1)
            right = [(o.argmax(1) == labels).double().mean().item() for o in (own, said)]
            out[t] = dict(score=100*right[1]/right[0], kl=(own.exp()*(own-said)).sum(1).mean().item())
        return out

def total(folds):
    out = HeadSums()
    for o in folds: out += o
    return out

def left(folds, ridge):
    "What heads that were fitted on the other folds leave missing of each, by moments."
    out = 0.
    for i, o in enumerate(folds):
        w, b = total([f for k, f in enumerate(folds) if k != i]).moves(ridge) if ridge else (0*o.fe.T, 0*o.e)
        out += float((w @ o.ff*w).sum()+2*b @ w @ o.f+o.n*b.square().sum()-2*(w.T*o.fe).sum()-2*b @ o.e)
    return out

def run_group(study):
    "Every choice, by its name."
    found = {}
    def note(name, body, sums=None, ridge=.1, ridges=None):
        each = ridges or dict.fromkeys(study.tasks, ridge)
        moves = {t: total(o).moves(each[t]) for t, o in (sums or {}).items() if each[t]}
        found[name] = study.score(body, moves)
    for share in (.125, .25, .5):
        parts = {t: split_calls(o, share) for t, o in study.calls.items()}
        body = study.body({t: o[0] for t, o in parts.items()})
        sums = study.sums(body, {t: o[1] for t, o in parts.items()})
        note(f'{share} kept', body, sums)
        if share != .25: continue
        note('0.25 kept, heads left alone', body)
        for r in RIDGES: note(f'0.25 kept, head ridge {r}', body, sums, r)
        own = {t: min((None, *RIDGES), key=lambda r: left(o, r)) for t, o in sums.items()}
        note('0.25 kept, head ridge by folds, each task its own', body, sums, ridges=own)
        def all_left(r): return sum(left(o, r)/float(total(o).fe.norm()) for o in sums.values())
        note('0.25 kept, head ridge by folds, one for all', body, sums, min(RIDGES, key=all_left))
        for r in (.03, .3):
            other = study.body({t: o[0] for t, o in parts.items()}, r)
            note(f'0.25 kept, body ridge {r}', other, study.sums(other, {t: o[1] for t, o in parts.items()}))
    whole, folds = study.body(study.calls), {t: dealt(o) for t, o in study.calls.items()}
    note('all rows, heads left alone', whole)
    note('all rows, heads on the same rows', whole, study.sums(whole, study.calls))
    apart = {t: [] for t in study.tasks}
    for k in range(FOLDS):
        body = study.body({t: joined([f for i, f in enumerate(o) if i != k]) for t, o in folds.items()})
        for t, o in study.sums(body, {t: o[k] for t, o in folds.items()}).items(): apart[t] += o
    note('all rows, heads by four bodies that each left a fold out', whole, apart)
    return found

def make_parser(about):
    "The options of a study."
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('checkpoints', type=Path)
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--num-samples', type=int, default=128)
    p.add_argument('--limit', type=int, default=250)
    p.add_argument('--seed', type=int, default=0)
    return p

def open_record(args, **more):
    "What a study has found so far, and its settings."
    about = dict(num_samples=args.num_samples, limit=args.limit, seed=args.seed) | more
    record = json.loads(args.out.read_text()) if args.out.is_file() else about | dict(groups={})
    if {k: record[k] for k in about} != about: raise SystemExit(f'{args.out} is of other settings')
    return record, about

def open_study(parser, kind, run):
    "Run a study over all groups, and write each as it is done."
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    record, about = open_record(args)
    todo = [g for g in GROUPS if g not in record['groups']]
    points = {t: load_checkpoint(args.checkpoints/t, t, args.limit) for t in dict.fromkeys('+'.join(todo).split('+')) if t}
    for c in points.values(): c.labels = torch.tensor(c.validation['labels'])
    calls = {t: measure('calls', c.model, c.train, num_samples=args.num_samples, seed=args.seed, tokenizer=c.tokenizer,
                        text=c.task.text, max_length=c.task.max_length) for t, c in points.items()}
    for g in todo:
        study = kind(g.split('+'), points, calls)
        with torch.no_grad():
            for m in study.models.values(): m.eval().requires_grad_(False)
            record['groups'][g] = run(study)
        write_record(args.out, **{k: record[k] for k in (*about, 'groups')})
        print(g, 'done', flush=True)

if __name__ == '__main__': open_study(make_parser(__doc__), Study, run_group)
