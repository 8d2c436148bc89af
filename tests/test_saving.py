"""What lies on disk and on the Hub: plain transformers reads it, the card is true, an upload is what `save_pretrained` writes."""
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer, BertModel, pipeline

from fisher_nodes import Merged, merge
from reference import body, tiny
from test_cli import save_model, save_rows

SIZE = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)

def states(m): return {f'{t}/{k}': v for t, o in m.items() for k, v in o.state_dict().items()}

def say(folder, **data):
    "Give a source a model card."
    (folder/'README.md').write_text('---\n'+yaml.safe_dump(data)+'---\nA model.\n')

@pytest.fixture
def sources(tmp_path):
    for i, t in enumerate('ab'): save_model(tmp_path/t, 2+i, seed=i)
    return {t: tmp_path/t for t in 'ab'}

def card_of(folder): return ModelCard.load(folder/'README.md')


# --- others read it ---------------------------------------------------------------------------

def test_methods_are_there_when_merger_is_all_that_was_imported():
    code = 'from fisher_nodes.merging.run import Merged; assert all(hasattr(Merged, o) for o in ("save_pretrained", "from_pretrained", "push_to_hub", "logits"))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode==0, done.stderr

def test_a_pipeline_answers_as_the_merge_does(sources, tmp_path):
    merged = merge(sources, method='average')
    merged.save_pretrained(tmp_path/'out')
    classify = pipeline('text-classification', model=str(tmp_path/'out'/'b'))
    tokens = AutoTokenizer.from_pretrained(tmp_path/'out')('it rains', return_tensors='pt')
    p = merged['b'](input_ids=tokens['input_ids'], attention_mask=tokens['attention_mask']).logits.softmax(-1)[0]
    said = classify('it rains', top_k=None)
    assert {o['label'] for o in said}=={'class a', 'class b', 'class c'}
    for o in said: assert_close(o['score'], p[merged['b'].config.label2id[o['label']]].item(), rtol=1e-5, atol=0)

def test_the_root_is_a_body_and_speaks_of_no_classes(sources, tmp_path):
    merged = merge(sources, method='average')
    merged.save_pretrained(tmp_path/'out')
    config = json.loads((tmp_path/'out'/'config.json').read_text())
    assert not {'id2label', 'label2id', 'problem_type', 'num_labels'}&set(config) and config['architectures']==['BertModel']
    assert json.loads((tmp_path/'out'/'b'/'config.json').read_text())['id2label']
    assert set(merged['b'].config.id2label.values())=={'class a', 'class b', 'class c'} # what is in memory is as before
    features = pipeline('feature-extraction', model=str(tmp_path/'out'))('it rains')
    want = merged.body(**AutoTokenizer.from_pretrained(tmp_path/'out')('it rains', return_tensors='pt')).last_hidden_state
    assert_close(torch.tensor(features), want.detach(), rtol=1e-5, atol=1e-7)

def test_the_three_lines_of_the_card_work(sources, tmp_path, monkeypatch):
    merged = merge(sources, method='average')
    merged.save_pretrained(tmp_path/'out')
    lines, = re.findall(r'```python\n(.*?)```', card_of(tmp_path/'out').text, re.S)
    assert len(lines.strip().splitlines())==3
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(lines, found)
    for k, v in merged['a'].state_dict().items(): assert_close(found['model'].state_dict()[k], v, rtol=0, atol=0)
    assert found['tokenizer']('it rains')['input_ids']

def test_a_merge_of_bare_bodies(tmp_path):
    models = {}
    for i, t in enumerate('ab'):
        torch.manual_seed(i)
        models[t] = BertModel(tiny().config)
    merge(models, method='average').save_pretrained(tmp_path/'out')
    assert card_of(tmp_path/'out').data.pipeline_tag=='feature-extraction'
    AutoModel.from_pretrained(tmp_path/'out'/'a')


# --- the card ---------------------------------------------------------------------------------

CARDS = {'same': (dict(license='mit'), dict(license='mit'), 'mit', None),
         'differ': (dict(license='mit'), dict(license='apache-2.0'), 'other', 'differs-by-source'),
         'one silent': (dict(license='mit'), dict(language='en'), 'other', 'not-stated-by-every-source'),
         'one without a card': (dict(license='mit'), None, 'other', 'not-stated-by-every-source'),
         'own licence': (dict(license='other', license_name='mine', license_link='https://x.org/l'),)*2 + ('other', 'mine'),
         'own licences': (dict(license='other', license_name='mine'), dict(license='other', license_name='yours'), 'other', 'differs-by-source')}

@pytest.mark.parametrize('a,b,license,name', CARDS.values(), ids=CARDS)
def test_licence(sources, a, b, license, name, tmp_path):
    for folder, data in zip(sources.values(), (a, b)):
        if data: say(folder, **data)
    merge(sources, method='average').save_pretrained(tmp_path/'out')
    card = card_of(tmp_path/'out')
    assert (card.data.license, card.data.license_name)==(license, name)
    agree = name in (None, 'mine')
    assert ('All sources state the same licence' in card.text)==agree and ('do not all state' in card.text)!=agree
    for t, data in zip('ab', (a, b)):
        row, = [o for o in card.text.split('## Licence')[1].splitlines() if o.startswith(f'| {t} ')]
        assert (data or {}).get('license_name', (data or {}).get('license', 'not stated')) in row

def test_an_unreadable_card_is_no_licence(sources, tmp_path):
    say(sources['a'], license='mit')
    (sources['b']/'README.md').write_text('---\nlicense: [mit\n---\n')
    merge(sources, method='average').save_pretrained(tmp_path/'out')
    assert card_of(tmp_path/'out').data.license=='other' and 'its card cannot be read' in card_of(tmp_path/'out').text

def test_the_base_has_a_licence_too(sources, tmp_path):
    for t in sources: say(sources[t], license='mit')
    tiny(vocab=len('[PAD] [UNK] [CLS] [SEP] it rains the sun shines on cats dogs'.split()), positions=512, dtype=torch.float32).save_pretrained(tmp_path/'base')
    say(tmp_path/'base', license='gpl-3.0')
    merge(sources, method='task-arithmetic', base=tmp_path/'base').save_pretrained(tmp_path/'out')
    assert card_of(tmp_path/'out').data.license_name=='differs-by-source' and 'gpl-3.0' in card_of(tmp_path/'out').text

def test_languages_and_data_sets(sources, tmp_path):
    say(sources['a'], language=['en', 'de'], datasets=['imdb'])
    say(sources['b'], language=['de', 'en'], datasets='snli')
    merge(sources, method='average').save_pretrained(tmp_path/'out')
    assert card_of(tmp_path/'out').data.language==['de', 'en'] and card_of(tmp_path/'out').data.datasets==['imdb', 'snli']
    say(sources['b'], language='fr')
    merge(sources, method='average').save_pretrained(tmp_path/'out', overwrite=True)
    assert card_of(tmp_path/'out').data.language is None

def told(folder):
    "A report, without what differs from place to place: the digests of card and recipe, which name the folder, and of tokenizers, written anew."
    found = json.loads((folder/'merge_report.json').read_text())
    for o in found['files'].values():
        if 'signed' in o or 'tokenizer' in o: del o['size'], o['sha256']
    return found

def test_metadata_and_words(sources, tmp_path):
    for t, n in dict(a=2, b=3).items(): save_rows(tmp_path/f'{t}.csv', list(range(n))*4)
    data = {t: tmp_path/f'{t}.csv' for t in 'ab'}
    merged = merge(sources, data=data, num_samples=6, seed=3, weights=dict(a=1, b=.25), progress=False)
    merged.save_pretrained(tmp_path/'out', scores=dict(a=dict(accuracy=.75, f1=.5)))
    card = card_of(tmp_path/'out')
    assert card.data.library_name=='transformers' and card.data.pipeline_tag=='feature-extraction'
    assert {'merge', 'fisher-mask-nodes'}<=set(card.data.tags) and card.data.base_model is None, 'a folder is no Hub id'
    assert {(o.metric_type, o.metric_value) for o in card.data.eval_results}=={('accuracy', .75), ('f1', .5)}
    rows = {o.split('|')[1].strip(): [c.strip() for c in o.split('|')[2:-1]] for o in card.text.split('## Licence')[0].splitlines() if o.startswith('|')}
    assert rows['a'][1:3]==['1', '6'] and rows['b'][1:3]==['0.25', '6'] and rows['a'][3]=='accuracy 0.75, f1 0.5' and rows['b'][3]==''
    assert (rows['method'], rows['variant'], rows['seed'])==(['mask-fisher'], ['paper'], ['3'])
    assert rows['head'][0]=='query, key' and rows['row'][0]=='ffn_in' and 'value' in rows['nothing: plain average'][0]
    assert json.loads((tmp_path/'out'/'merge_report.json').read_text())['scores']==dict(a=dict(accuracy=.75, f1=.5))
    back = Merged.from_pretrained(tmp_path/'out')
    back.save_pretrained(tmp_path/'again'/'out')
    assert (tmp_path/'again'/'out'/'README.md').read_bytes()==(tmp_path/'out'/'README.md').read_bytes()
    assert told(tmp_path/'again'/'out')==told(tmp_path/'out')

def test_no_path_of_this_machine_is_told(sources, tmp_path):
    merge(sources, method='average').save_pretrained(tmp_path/'out')
    for name in ('README.md', 'merge_report.json', 'recipe.yml', 'config.json', 'a/config.json'):
        assert str(tmp_path) not in (tmp_path/'out'/name).read_text(), name
    merge(sources, method='average').save_pretrained(tmp_path/'hub', repo_id='me/two')
    assert yaml.safe_load((tmp_path/'hub'/'recipe.yml').read_text())['models']['a']['model'] is None
    assert 'from_pretrained("me/two", subfolder="a")' in (tmp_path/'hub'/'README.md').read_text()

def test_weights_changed_after_merging_are_told(sources, tmp_path):
    merged = merge(sources, method='average')
    merged.save_pretrained(tmp_path/'out')
    assert 'changed after merging' not in (tmp_path/'out'/'recipe.yml').read_text()+card_of(tmp_path/'out').text
    with torch.no_grad(): merged['a'].classifier.weight[0, 0] += 1
    merged.save_pretrained(tmp_path/'changed')
    for name in ('README.md', 'recipe.yml'): assert 'changed after merging' in (tmp_path/'changed'/name).read_text()

@pytest.mark.parametrize('scores', [{}, dict(x=dict(f1=1)), dict(a=.5), dict(a={}), dict(a=dict(f1='high')), dict(a=dict(f1=float('nan')))], ids=str)
def test_bad_scores_write_nothing(scores, tmp_path):
    merged = merge({t: tiny(seed=i) for i, t in enumerate('ab')}, method='average')
    with pytest.raises(ValueError, match='`scores`'): merged.save_pretrained(tmp_path/'out', scores=scores)
    assert not (tmp_path/'out').exists() and 'scores' not in merged.report


# --- sentence-transformers --------------------------------------------------------------------

def as_sentence_model(folder, mode='mean', kinds=(('', 'Transformer'), ('1_Pooling', 'Pooling'), ('2_Normalize', 'Normalize'))):
    modules = [dict(idx=i, name=str(i), path=p, type=f'sentence_transformers.models.{k}') for i, (p, k) in enumerate(kinds)]
    (folder/'modules.json').write_text(json.dumps(modules))
    (folder/'sentence_bert_config.json').write_text(json.dumps(dict(max_seq_length=12, do_lower_case=False)))
    (folder/'1_Pooling').mkdir(exist_ok=True)
    (folder/'1_Pooling'/'config.json').write_text(json.dumps(dict(word_embedding_dimension=16, pooling_mode_mean_tokens=mode=='mean', pooling_mode_cls_token=mode=='cls')))

ST = ('modules.json', 'sentence_bert_config.json', '1_Pooling/config.json')

def test_sentence_transformers_files_come_along(sources, tmp_path):
    as_sentence_model(sources['a'])
    merge(sources, method='average').save_pretrained(tmp_path/'out')
    Merged.from_pretrained(tmp_path/'out').save_pretrained(tmp_path/'again')
    for out in ('out', 'again'):
        for name in ST: assert json.loads((tmp_path/out/name).read_text())==json.loads((sources['a']/name).read_text())
    assert 'sentence-transformers' in card_of(tmp_path/'out').data.tags

def test_it_loads_as_a_sentence_transformer(sources, tmp_path):
    st = pytest.importorskip('sentence_transformers', reason='sentence-transformers is not a dependency')
    for t in sources: as_sentence_model(sources[t])
    merged = merge(sources, method='average')
    merged.save_pretrained(tmp_path/'out')
    got = st.SentenceTransformer(str(tmp_path/'out'), device='cpu').encode(['it rains', 'the sun shines on cats'], convert_to_tensor=True)
    for text, g in zip(['it rains', 'the sun shines on cats'], got):
        x = AutoTokenizer.from_pretrained(tmp_path/'out')(text, return_tensors='pt')
        with torch.no_grad(): want = merged.body(x['input_ids'], x['attention_mask']).last_hidden_state[0].mean(0)
        assert_close(g, want/want.norm(), rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('change', ['differ', 'weights', 'code', 'path', 'broken'])
def test_what_cannot_be_kept_is_told(sources, change, tmp_path):
    for t in sources: as_sentence_model(sources[t])
    if change=='differ': as_sentence_model(sources['b'], mode='cls')
    if change=='weights': as_sentence_model(sources['b'], kinds=[('', 'Transformer'), ('2_Dense', 'Dense')])
    if change=='path': as_sentence_model(sources['b'], kinds=[('', 'Transformer'), ('../../evil', 'Pooling')])
    if change=='code': (sources['b']/'modules.json').write_text('[{"path": "", "type": "my_code.Transformer"}]')
    if change=='broken': (sources['b']/'modules.json').write_text('{')
    merged = merge(sources, method='average')
    merged.save_pretrained(tmp_path/'out')
    assert 'why' in merged.report['sentence_transformers'] and not any((tmp_path/'out'/o).exists() for o in ST)
    assert 'were not kept' in card_of(tmp_path/'out').text


# --- the Hub ----------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
from fisher_nodes import Merged
here = Path(sys.argv[1])
merged = Merged.from_pretrained(here/'out')
said = {}
def refused(what, *args, **kw):
    try: merged.push_to_hub(*args, **kw); said[what] = None
    except ValueError as e: said[what] = str(e)
def run(): exec(sys.argv[2], globals())
run()
print(json.dumps(said))
"""

def elsewhere(hub, tmp_path, code, **env):
    "Run `code` in a process that believes the stand-in to be the Hub."
    env = os.environ | dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1', HF_HOME=str(tmp_path/'hf'), HF_HUB_DISABLE_PROGRESS_BARS='1',
                            HF_HUB_DISABLE_TELEMETRY='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1') | env
    env = {k: v for k, v in env.items() if v is not None}
    done = subprocess.run([sys.executable, '-c', SCRIPT, str(tmp_path), code], capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode==0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

def files_of(folder): return {o.relative_to(folder).as_posix(): o.read_bytes() for o in folder.rglob('*') if o.is_file()}

def test_push_and_load(hub, sources, tmp_path):
    "What arrives is what `save_pretrained` writes, in one commit; it loads from there by our loader and by plain transformers."
    as_sentence_model(sources['a'])
    merged = merge(sources, method='average')
    merged.save_pretrained(tmp_path/'out')
    said = elsewhere(hub, tmp_path, """
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from fisher_nodes import Source, merge
said['url'] = merged.push_to_hub('two', private=True, scores=dict(a=dict(accuracy=.5)))
merged.save_pretrained(here/'two', repo_id='me/two', scores=dict(a=dict(accuracy=.5)))
back = Merged.from_pretrained('me/two')
back.save_pretrained(here/'back')
AutoModelForSequenceClassification.from_pretrained('me/two', subfolder='b').save_pretrained(here/'b_plain')
AutoModel.from_pretrained('me/two').save_pretrained(here/'body_plain')
AutoTokenizer.from_pretrained('me/two')
again = merged.push_to_hub('me/two', revision='next', commit_message='again')
""", HF_TOKEN='good')
    repo = hub.repos['me/two']
    assert repo['files']==files_of(tmp_path/'two') and {'model.safetensors', 'a/config.json', 'merge_report.json', 'recipe.yml', 'modules.json'}<=set(repo['files'])
    assert repo['private'] and [c[:2] for c in repo['commits']]==[('main', 'Merge a, b'), ('next', 'again')] and 'next' in repo['branches']
    assert said['url'].startswith(f'{hub.url}/me/two/commit/')
    back = Merged.from_pretrained(tmp_path/'back')
    for k, v in states(merged).items(): assert_close(states(back)[k], v, rtol=0, atol=0)
    for k, v in body(merged['a']).items(): assert_close(AutoModel.from_pretrained(tmp_path/'body_plain').state_dict()[k], v, rtol=0, atol=0)
    assert (tmp_path/'b_plain'/'model.safetensors').is_file()
    assert json.loads((tmp_path/'back'/'merge_report.json').read_text())['scores']==dict(a=dict(accuracy=.5))

def test_sources_on_the_hub(hub, sources, tmp_path):
    "Their ids, commits and licences reach card and recipe; the recipe fetches that very commit."
    say(sources['a'], license='mit')
    merge(sources, method='average').save_pretrained(tmp_path/'out')
    for t in sources: hub.repos[f'me/{t}'] = dict(files=files_of(sources[t]), sha=hashlib.sha1(t.encode()).hexdigest(), commits=[], branches=['main'])
    elsewhere(hub, tmp_path, """
from fisher_nodes import merge, run_recipe
merge(dict(a='me/a', b='me/b'), method='average').save_pretrained(here/'from_hub')
run_recipe(here/'from_hub'/'recipe.yml', here/'repeated')
""", HF_TOKEN='good')
    card, recipe = card_of(tmp_path/'from_hub'), yaml.safe_load((tmp_path/'from_hub'/'recipe.yml').read_text())
    assert card.data.base_model==['me/a', 'me/b'] and card.data.to_dict()['base_model_relation']=='merge' and '| a | me/a | mit |' in card.text and f"- b: me/b at {hub.repos['me/b']['sha']}" in card.text
    assert recipe['models']['b']['model']=='me/b' and recipe['models']['b']['revision']==hub.repos['me/b']['sha']
    assert 'not stated: it has no model card' in card.text
    for name in ('model.safetensors', 'recipe.yml'): assert (tmp_path/'from_hub'/name).read_bytes()==(tmp_path/'repeated'/name).read_bytes()
    assert told(tmp_path/'from_hub')==told(tmp_path/'repeated') and told(tmp_path/'from_hub')['inputs']['model']['a'].keys()>={'config.json', 'model.safetensors'}

def test_what_cannot_be_pushed(hub, tmp_path):
    "One line each, and nothing is uploaded."
    merge({t: tiny(seed=i) for i, t in enumerate('ab')}, method='average').save_pretrained(tmp_path/'out')
    said = elsewhere(hub, tmp_path, """
refused('name', 'no/such/name')
refused('no token', 'me/x')
refused('bad token', 'me/x', token='bad')
refused('scores', 'me/x', token='good', scores=dict(x=1))
refused('not mine', 'you/x', token='good')
try: Merged.from_pretrained('me/nothing', token='good'); said['load'] = None
except ValueError as e: said['load'] = str(e)
""", HF_TOKEN=None)
    for k, word in {'name': 'no/such/name', 'no token': 'hf auth login', 'bad token': 'does not know this token', 'scores': '`scores`',
                    'not mine': 'cannot push to you/x', 'load': 'me/nothing'}.items():
        assert said[k] and word in said[k] and '\n' not in said[k], (k, said[k])
    assert not hub.repos and not hub.lfs
    assert hub.log.count(('POST', '/api/repos/create'))==1, 'only what the Hub alone can refuse gets as far as that'
