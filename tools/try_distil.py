"""What training adds to residual regression: its body, brought nearer to the own models by gradients, on the same rows.

As `tools/try_residual.py`, on the same rows; an interrupted run goes on where it was. Minutes a pair on a core:
  FISHER_NODES_GLUE=DIR python tools/try_distil.py CHECKPOINTS --out nbs/results/best/distilled.json
"""
import time
from copy import deepcopy

import torch
from fisher_nodes.methods.calls import as_given, split_calls
from try_more import More, replaced
from try_residual import make_parser, open_study, total

STEPS, WARM, RATE, HIDDEN = 160, 20, 1e-4, .1 # batches of each task, learning rate at most, weight of the layers
LOTS = {'own rows': 0., 'four of five lots with replaced tokens': .8} # name -> share of passes over changed rows

def distance(had, got, mask):
    "KL of the answers, and what the tokens of all layers lack, relative to their variance."
    p, q = (o.logits.log_softmax(1) for o in (had, got))
    out = (p.exp()*(p-q)).sum(1).mean()
    for a, b in zip(had.hidden_states[1:], got.hidden_states[1:]):
        a, b = a[mask], b[mask]
        out = out+HIDDEN*(a-b).square().sum()/a.var(0, unbiased=False).sum()/len(a)
    return out

def with_heads(study, body, moves):
    "The body as every task has it, its head moved."
    found = {}
    for t, m in study.models.items():
        found[t] = deepcopy(m)
        setattr(found[t], m.base_model_prefix, body)
        head = found[t].get_submodule(study.names[t])
        for p, o in zip((head.weight, head.bias), moves[t]): p.add_(o.to(p))
    return found

def lots(calls, share, seed=0):
    "Batches of all tasks side by side, without end; some passes with replaced tokens."
    g, again = torch.Generator().manual_seed(seed), 0
    while True:
        again += 1
        new = {t: torch.rand(1, generator=g).item()<share for t in calls}
        now = {t: replaced(o, 999, again).calls if new[t] else o.calls for t, o in calls.items()}
        orders = [torch.randperm(len(o), generator=g).tolist() for o in now.values()]
        for at in zip(*orders): yield {t: now[t][i] for t, i in zip(now, at)}

def step(models, merged, batch):
    "Gradients of one batch of each task."
    for t, call in batch.items():
        here = as_given(call, models[t]) | dict(output_hidden_states=True)
        with torch.no_grad(): had = models[t](**here)
        distance(had, merged[t](**here), here['attention_mask'].bool()).backward()

def distil(study, body, moves, rows, share):
    "Train the body in place, all but its embeddings, on the rows that it was fitted to."
    merged = with_heads(study, body, moves)
    trained = [p for n, p in body.named_parameters() if 'embed' not in n]
    for p in trained: p.requires_grad_(True)
    steps = torch.optim.AdamW(trained, lr=RATE, weight_decay=0)
    rate = torch.optim.lr_scheduler.LambdaLR(steps, lambda i: min(1, (i+1)/WARM)*(1-i/STEPS))
    with torch.enable_grad():
        for _, batch in zip(range(STEPS), lots(rows, share)):
            step(study.models, merged, batch)
            steps.step(); rate.step(); steps.zero_grad()
    for p in trained: p.requires_grad_(False)

def run_group(study):
    "Every choice, by its name."
    found, parts = {}, {t: split_calls(o, .25) for t, o in study.calls.items()}
    first, kept = ({t: o[i] for t, o in parts.items()} for i in (0, 1))
    def note(name, body):
        moves = {t: total(o).moves() for t, o in study.sums(body, kept).items()}
        found[name] = study.score(deepcopy(body), moves)
        return moves
    start = study.body(first)
    moves = note('as it is', start)
    for name, share in LOTS.items():
        body, began = deepcopy(start), time.perf_counter()
        distil(study, body, moves, first, share)
        note(f'and {STEPS} steps, {name}', body)
        print(name, round(time.perf_counter()-began), 's', flush=True)
    return found

if __name__=='__main__': open_study(make_parser(__doc__), More, run_group)
