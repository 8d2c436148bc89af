"""How far each task's own masks, norms and biases go from the average, mask Fisher and residual regression.

Scores and divergences of some groups of GLUE checkpoints at one N; an interrupted run goes on where it was. Heads are
fitted everywhere, on rows kept apart, which also choose damping and steps. A minute or so a group and body on a core:
  FISHER_NODES_GLUE=DIR python tools/try_masks.py CHECKPOINTS --out nbs/results/best/masks.json
"""
import time
import warnings
from copy import deepcopy

import torch
from tqdm.auto import tqdm
from fisher_nodes.core.families import body_of
from fisher_nodes.core.places import find_nodes
from fisher_nodes.engine.files import write_record
from fisher_nodes.engine.measure import measure
from fisher_nodes.experiment.grid import load_checkpoint
from fisher_nodes.methods import residual
from fisher_nodes.methods.average import average_model
from fisher_nodes.methods.calls import split_calls
from fisher_nodes.methods.mask_fisher import mask_fisher_rule
from fisher_nodes.methods.masks import fit_masks, fold_masks, mean_kl, own_norms, with_numbers
from fisher_nodes.methods.method import Job
from fisher_nodes.methods.refit import refit_head
from try_residual import make_parser, open_record

TUNING = 'mnli+sst2', 'sst2+qnli'
GROUPS = *TUNING, 'mnli+qqp+qnli+sst2+mrpc+rte', 'mrpc+rte', 'qqp+mrpc', 'mnli+rte'
BODIES = 'average', 'residual-regression', 'residual-regression, rows apart', 'mask-fisher'
KEPT = .25 # share of a task's rows that fits heads and chooses
WRITTEN = 'versions', 'machine', 'commit', 'date' # anew each time
APART = 1/3 # share of the others that a body leaves to masks

class Study:
    "One group of checkpoints."
    def __init__(self, tasks, points, calls, fishers):
        self.tasks, self.points = tasks, {t: points[t] for t in tasks}
        self.models = {t: o.model for t, o in self.points.items()}
        self.fishers = {t: fishers[t] for t in tasks if t in fishers}
        split = {t: split_calls(calls[t], KEPT) for t in tasks}
        self.rows, self.kept = {t: o[0] for t, o in split.items()}, {t: o[1] for t, o in split.items()}

    def job(self, statistics):
        states = {t: dict(body_of(m).named_parameters()) for t, m in self.models.items()}
        return Job(states, torch.ones(len(states)).double(), statistics, model=self.models[self.tasks[0]], models=self.models)

    def body(self, name):
        "A merged body, and the rows that masks are fitted to."
        rows, given = self.rows, self.rows
        if name.endswith('rows apart'):
            split = {t: split_calls(o, APART) for t, o in self.rows.items()}
            rows, given = {t: o[0] for t, o in split.items()}, {t: o[1] for t, o in split.items()}
        if name == 'mask-fisher':
            job = self.job(self.fishers)
            model, rule = average_model(job).eval(), mask_fisher_rule(job)
            for n, p in body_of(model).named_parameters():
                if n in job.names: p.copy_(rule.combine(n, [s[n] for s in job.states.values()]))
        else:
            job = self.job(rows)
            model = average_model(job).eval()
            if name.startswith('residual'): residual.fit_body(model, residual.make_lanes(job, model), .1)
        return body_of(model), given

    def score(self, task, body, refit):
        "Accuracy relative to the own model's in percent, and KL."
        c = self.points[task]
        own, new = c.own_answers(), deepcopy(c.model)
        for n, v in (refit.numbers(new) if refit else {}).items(): new.get_parameter(n).copy_(v)
        setattr(new, new.base_model_prefix, body)
        said = c.answers(new)[0]
        right = [(o.argmax(1) == c.labels).double().mean().item() for o in (own, said)]
        return dict(score=100*right[1]/right[0], kl=mean_kl(own, said))

    def cells(self, task, body, given, more):
        "Every choice for one task, by its name."
        model, kept, found = self.models[task], self.kept[task], {}
        found['as is'] = self.score(task, body, refit_head(model, body, kept))
        def masked(name, **how):
            start = time.perf_counter()
            fit = fit_masks(model, body, given[task], kept, **how)
            took = time.perf_counter()-start
            with with_numbers(body, fold_masks(body, fit.masks)): found[name] = self.score(task, body, fit.refit)
            every = torch.cat([*fit.masks.values()])
            found[name] |= dict(seconds=took, kept_kl=fit.kl, dampings=fit.dampings, spread=every.std().item())
        masked('masks')
        if more: masked('masks, each layer by itself', together=False)
        with with_numbers(body, own_norms(model)):
            found['own norms and biases'] = self.score(task, body, refit_head(model, body, kept))
            masked('both')
        if not more: return found
        with with_numbers(body, own_norms(model, biases=False)):
            found['own norms'] = self.score(task, body, refit_head(model, body, kept))
        return found

def extras(model):
    "Numbers of a task's own, and of a body."
    body = body_of(model)
    fit = {n: t.numel() for n, t in own_norms(model).items()}
    nodes = sum(o.counts[o.kind] for o in find_nodes(body))
    return dict(masks=nodes, norms_and_biases=sum(fit.values()), body=sum(p.numel() for p in body.parameters()))

def main():
    p = make_parser(__doc__)
    p.add_argument('--groups', nargs='*', default=GROUPS)
    p.add_argument('--bodies', nargs='*', default=BODIES)
    args = p.parse_args()
    warnings.simplefilter('ignore')
    record, _ = open_record(args, kept=KEPT, tuning=list(TUNING))
    def missing(g, b): return [t for t in g.split('+') if t not in record['groups'].get(g, {}).get(b, {})]
    todo = [(g, b) for g in args.groups for b in args.bodies if missing(g, b)]
    if not todo: return
    points = {t: load_checkpoint(args.checkpoints/t, t, args.limit) for t in dict.fromkeys('+'.join(g for g, _ in todo).split('+'))}
    for c in points.values(): c.labels = torch.tensor(c.validation['labels'])
    how = dict(num_samples=args.num_samples, seed=args.seed, progress=False)
    def look(what, c):
        return measure(what, c.model, c.train, tokenizer=c.tokenizer, text=c.task.text, max_length=c.task.max_length, **how)
    calls = {t: look('calls', c) for t, c in points.items()}
    fishers = {t: look('mask-fisher', c) for t, c in points.items()} if any(b == 'mask-fisher' for _, b in todo) else {}
    for m in (c.model for c in points.values()): m.eval().requires_grad_(False)
    record |= dict(device='cpu', threads=torch.get_num_threads(), extras=extras(next(iter(points.values())).model))
    for g, b in (bar := tqdm(todo, unit='body')):
        bar.set_postfix_str(f'{g}, {b}')
        study = Study(g.split('+'), points, calls, fishers)
        with torch.no_grad():
            body, given = study.body(b)
            for t in missing(g, b):
                found = study.cells(t, body, given, g == TUNING[0])
                record['groups'].setdefault(g, {}).setdefault(b, {})[t] = found
                write_record(args.out, **{k: v for k, v in record.items() if k not in WRITTEN})

if __name__ == '__main__': main()
