"""What else was tried around residual regression: heads by divergence, rows with replaced tokens, shares by need.

As `tools/try_residual.py`, on the same rows; an interrupted run goes on where it was:
  FISHER_NODES_GLUE=DIR python tools/try_more.py CHECKPOINTS --out nbs/results/best/tried_more.json
"""
import torch
from fisher_nodes.methods import residual
from fisher_nodes.methods.average import average_model
from fisher_nodes.methods.calls import Calls, as_given, split_calls
from fisher_nodes.methods.method import Job
from fisher_nodes.methods.refit import on_body
from fisher_nodes.core.families import body_of
from fisher_nodes.core.walk import reads, watching
from try_residual import Study, joined, make_parser, open_study, total

PENALTIES = .003, .01, .03, .1, .3
REPLACED = .3 # share of the tokens

def features(model, body, rows, name):
    "What the last matrix is given on another body, what it makes of it, and what the model said; float64."
    found = []
    for call in rows.calls:
        here, seen = as_given(call, model), []
        own = model(**here).logits
        with watching(reads(model.get_submodule(name), seen.append)):
            got = on_body(model, body(**here))(**here).logits
        found.append((seen[0], got, own))
    return [torch.cat(o).double() for o in zip(*found)]

def heads_by_kl(f, got, own, penalty):
    "The move of the last matrix that brings the answers nearest in KL, with a pull to no move; (weight, bias)."
    size = penalty*(f-f.mean(0)).square().sum(1).mean()
    p = own.log_softmax(1)
    w = torch.zeros(own.shape[1], f.shape[1], dtype=f.dtype, requires_grad=True)
    b = torch.zeros(own.shape[1], dtype=f.dtype, requires_grad=True)
    steps = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn='strong_wolfe', tolerance_change=1e-12)
    def loss():
        steps.zero_grad()
        q = (got+f @ w.T+b).log_softmax(1)
        out = (p.exp()*(p-q)).sum(1).mean()+size/2*w.square().sum()
        out.backward()
        return out
    with torch.enable_grad(): steps.step(loss)
    return w.detach(), b.detach()

def replaced(calls, above, seed=0):
    "The same rows, with some of their tokens taken from other rows; numbers up to `above` stay."
    g, values = torch.Generator().manual_seed(seed), dict(calls.values)
    words = torch.cat([o['input_ids'].flatten() for o in calls.calls])
    words = words[words>above] # the special tokens of BERT have lower numbers
    for i, o in enumerate(calls.calls):
        ids = o['input_ids']
        drawn = words[torch.randint(len(words), ids.shape, generator=g)]
        values[f'{i}.input_ids'] = torch.where((torch.rand(ids.shape, generator=g)<REPLACED) & (ids>above), drawn, ids)
    return Calls(values, calls.num_examples)

class More(Study):
    def body(self, rows, shares=None):
        states = {t: dict(body_of(m).named_parameters()) for t, m in self.models.items()}
        shares = torch.ones(len(states)).double() if shares is None else shares
        job = Job(states, shares, rows, model=self.models[self.tasks[0]], models=self.models)
        model = average_model(job).eval()
        residual.fit_body(model, residual.make_lanes(job, model), .1)
        return body_of(model)

def run_group(study):
    "Every choice, by its name."
    found = {}
    parts = {t: split_calls(o, .25) for t, o in study.calls.items()}
    first, kept = ({t: o[i] for t, o in parts.items()} for i in (0, 1))
    def note(name, body):
        moves = {t: total(o).moves() for t, o in study.sums(body, kept).items()}
        found[name] = study.score(body, moves)
        return body
    body = note('as it is', study.body(first))
    seen = {t: features(m, body, kept[t], study.names[t]) for t, m in study.models.items()}
    for p in PENALTIES: found[f'heads by KL, penalty {p}'] = study.score(body, {t: heads_by_kl(*o, p) for t, o in seen.items()})
    note('and as many rows with replaced tokens', study.body({t: joined([o, replaced(o, 999)]) for t, o in first.items()}))
    def lacks(f, got, own):
        p, q = own.log_softmax(1), got.log_softmax(1)
        return (p.exp()*(p-q)).sum(1).mean()
    need = torch.stack([lacks(*o) for o in seen.values()])
    for power in (.25, .5): note(f'shares by need, power {power}', study.body(first, need**power))
    return found

if __name__=='__main__': open_study(make_parser(__doc__), More, run_group)
