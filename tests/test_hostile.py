"""What comes from elsewhere is data: nothing is let in. A seeded sample of tests/faults/hostile.py, and the kinds by name."""
import ast, json, os, shutil, sys
from pathlib import Path

import pytest
import torch
import safetensors.torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent/'faults'))
import hostile
from fisher_nodes import Merged, merge, merge_files, run_recipe
from fisher_nodes.engine.models import load_model, load_tokenizer
from fisher_nodes.engine.reading import parse_yaml
from fisher_nodes.merging.card import read_card
from transformers import BertConfig
from test_bad_input import refuses

pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(scope='module')
def sandbox(tmp_path_factory):
    here = tmp_path_factory.mktemp('hostile')/'sandbox'
    here.mkdir()
    hostile.make_sandbox(here)
    return here

@pytest.fixture
def here(sandbox, tmp_path):
    "A copy of two whole models, Fishers, rows, and a merge, with a folder outside."
    shutil.copytree(sandbox, tmp_path/'in')
    hostile.outside(tmp_path/'in').mkdir()
    return tmp_path/'in'

def pair(here): return {t: here/t for t in 'ab'}
def both(here):
    "What `merge` and `merge_files` say, which is the same."
    said = []
    for f in (lambda: merge(pair(here), method='average'), lambda: merge_files(pair(here), method='average', out=here/'new')):
        with pytest.raises((ValueError, FileNotFoundError)) as e: f()
        said.append(str(e.value))
    assert said[0]==said[1] and '\n' not in said[0] and not (here/'new').exists()
    return said[0]


# --- by chance ------------------------------------------------------------------------------

@pytest.mark.parametrize('door', [o for o in hostile.DOORS if o not in hostile.COMMANDS])
def test_a_sample_of_hostile_inputs(door):
    "Fine or clear, every one; the long run is tests/faults/hostile.py."
    counts, bad = hostile.run(12, {door: hostile.DOORS[door]}, start=70000)
    assert sum(counts[door].values())==12 and not bad, json.dumps(bad, indent=1)

def test_a_sample_at_commands_that_write():
    doors = {k: o for k, o in hostile.COMMANDS.items() if 'adapters' not in k and k!='shell_reproduce'}
    counts, bad = hostile.run(1, doors, start=70000)
    assert all(sum(o.values())==1 for o in counts.values()) and not bad, json.dumps(bad, indent=1)


# --- names are data -------------------------------------------------------------------------

PLANTED = ['../planted.json', '../../outside/planted.json', '/tmp/planted.json', 'x.json', 'a/config.json', 'model.safetensors', '1_P/../../planted/config.json', '1_Pooling/config.json/x',
           'modules.json\n', '', '.', '1_Pooling\\config.json']

@pytest.mark.parametrize('name', PLANTED)
def test_a_report_names_no_file_to_write(name, here):
    path = here/'merged'/'merge_report.json'
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | dict(sentence_transformers=dict(files={name: {}}))))
    with refuses('merge_report.json', 'not a file of sentence-transformers'): Merged.from_pretrained(here/'merged')
    merged = merge(pair(here), method='average')
    merged.report['sentence_transformers'] = dict(files={name: {}})
    with refuses('not a file of sentence-transformers'): merged.save_pretrained(here/'out')
    assert not any(o.name.startswith('planted') for o in here.parent.rglob('*')) and not (here/'out').exists()

def test_files_of_sentence_transformers_are_still_kept(here):
    assert (here/'merged'/'1_Pooling'/'config.json').is_file()
    Merged.from_pretrained(here/'merged').save_pretrained(here/'again')
    assert (here/'again'/'1_Pooling'/'config.json').read_bytes()==(here/'merged'/'1_Pooling'/'config.json').read_bytes()

@pytest.mark.parametrize('task', ['..', '.', '../a', '/etc', 'a/..', '', 'x\0', 'model.safetensors', 'a '])
def test_a_report_names_no_folder_elsewhere(task, here):
    path = here/'merged'/'merge_report.json'
    report = json.loads(path.read_text())
    report['tasks'][task] = report['tasks'].pop('a')
    path.write_text(json.dumps(report))
    with refuses('is not a merge report'): Merged.from_pretrained(here/'merged')

@pytest.mark.parametrize('name', ['../outside/w.safetensors', '/etc/w.safetensors', 'pytorch_model.bin', 'config.json', '', '.safetensors/../x.safetensors', 3, None, 'a\0.safetensors', 'x//y.safetensors'])
def test_an_index_names_safetensors_in_its_folder(name, here):
    (here/'b'/'model.safetensors').unlink()
    (here/'b'/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={'w': name})))
    assert 'is not an index of weights' in both(here)

LINKS = ['config.json', 'model.safetensors', 'tokenizer.json', 'special_tokens_map.json', 'README.md', 'chat_template.jinja', '1_Pooling/config.json']

@pytest.mark.parametrize('name', LINKS)
def test_links_that_leave_the_folder_are_not_followed(name, here):
    path, target = here/'b'/name, hostile.outside(here)/'file'
    shutil.copy(path, target) if path.exists() else target.write_text('{}')
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    if name != '1_Pooling/config.json': assert 'is a link that leaves its folder' in both(here)
    else: assert 'leaves its folder' in merge(pair(here), method='average').report['sentence_transformers']['why']

def test_links_inside_the_folder_and_hard_links_are_files(here):
    for f in ('model.safetensors', 'config.json'):
        (here/'b'/f).rename(here/'b'/f'real-{f}')
        (here/'b'/f).symlink_to(f'real-{f}')
    shutil.copytree(here/'a', here/'c', copy_function=os.link)
    (here/'latest').symlink_to(here/'b')
    merge_files(dict(a=here/'c', b=here/'latest'), method='average', out=here/'new')
    task = Merged.from_pretrained(here/'new')['b']
    assert torch.equal(load_model(here/'new'/'b').classifier.weight, task.classifier.weight)

def test_the_cache_of_the_hub_is_links_to_blobs_of_its_repository(here):
    repo = here/'hub'/'models--user--model'
    folder = repo/'snapshots'/('0'*40)
    folder.mkdir(parents=True); (repo/'blobs').mkdir()
    for i, o in enumerate(o for o in (here/'merged').rglob('*') if o.is_file()):
        (repo/'blobs'/str(i)).write_bytes(o.read_bytes())
        link = folder/o.relative_to(here/'merged')
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repo/'blobs'/str(i), link.parent))
    found = Merged.from_pretrained(folder)
    assert found.tokenizer is not None and list(found)==['a', 'b']
    other = here/'hub'/'models--user--other'/'blobs'
    other.mkdir(parents=True)
    shutil.copy(folder/'a'/'config.json', other/'0')
    (folder/'a'/'config.json').unlink()
    (folder/'a'/'config.json').symlink_to(other/'0')
    with refuses('is a link that leaves its folder'): Merged.from_pretrained(folder)

def test_a_task_folder_may_not_be_a_link_elsewhere(here):
    shutil.rmtree(here/'merged'/'a')
    (here/'merged'/'a').symlink_to(here/'a')
    with refuses('leaves its folder'): Merged.from_pretrained(here/'merged')


# --- no code --------------------------------------------------------------------------------

def test_every_loader_is_told_to_run_no_code():
    "Each `from_pretrained` and `from_config` of the package passes it."
    root, found = Path(hostile.fisher_nodes.__file__).parent, 0
    for path in root.rglob('*.py'):
        text = path.read_text()
        for o in ast.walk(ast.parse(text)):
            if not (isinstance(o, ast.Call) and isinstance(o.func, ast.Attribute) and o.func.attr in ('from_pretrained', 'from_config')): continue
            owner = ast.unparse(o.func.value)
            if owner in ('Merged', 'BertForSequenceClassification', 'self', 'GenerationConfig') : continue # the last is a table of numbers
            found += 1
            said = ast.unparse(o)
            assert 'trust_remote_code=False' in said or '**HOW' in said or '**how' in said, f'{path.name}: {said}'
    assert found>=8

@pytest.mark.parametrize('model_type', ['bert', 'evil', 'gpt2'])
def test_a_yes_on_standard_input_runs_no_code(model_type, here, monkeypatch):
    import io
    hostile.evil_code(here/'b', here)
    path = here/'b'/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(model_type=model_type) | dict(hostile.CONFIG[:1])))
    (here/'b'/'tokenizer_config.json').write_text(json.dumps(dict(auto_map=dict(AutoTokenizer=['evil.Evil', 'evil.Evil']), tokenizer_class='Evil')))
    monkeypatch.setattr('sys.stdin', io.StringIO('y\n'*99))
    for f in (lambda: load_model(here/'b'), lambda: load_tokenizer(here/'b'), lambda: merge_files(pair(here), method='average', out=here/'new')):
        try: f()
        except ValueError as e: assert '\n' not in str(e)
    assert not (hostile.outside(here)/'RAN').exists()

def test_code_on_the_hub_is_not_named(here):
    path = here/'b'/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(attn_implementation='user/kernel')))
    assert 'names code on the Hub' in both(here)

@pytest.mark.parametrize('name', ['adapter_model.bin', 'other.safetensors', '../a/model.safetensors'])
def test_a_configuration_names_no_file_of_weights(name, here):
    "transformers would read it in place of model.safetensors, `adapter_model.bin` as a pickle."
    path = here/'b'/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(transformers_weights=name)))
    torch.save(load_model(here/'a').state_dict(), here/'b'/'adapter_model.bin')
    assert f'`transformers_weights` is {name!r}; weights are read from model.safetensors only' in both(here)


# --- within bounds --------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.json', 'added_tokens.json', 'generation_config.json', 'README.md'])
@pytest.mark.parametrize('kind', ['pipe', 'folder', 'socket', 'zero'])
def test_what_is_no_file_is_not_opened(name, kind, here):
    class only:
        def choice(self, _): return kind
    hostile.special(here/'b'/name, only(), here)
    said = both(here)
    assert 'expected a regular file' in said or 'leaves its folder' in said, said

@pytest.mark.parametrize('text', ['['*9999, '{"a": '*9999, '{"a": '+'9'*5000+'}', '{"a": '+'['*60+']'*60+'}'], ids=['lists', 'objects', 'digits', 'deep'])
@pytest.mark.parametrize('name', ['b/config.json', 'b/tokenizer_config.json', 'merged/merge_report.json'])
def test_json_is_bounded(text, name, here):
    (here/name).write_text(text)
    def run(): Merged.from_pretrained(here/'merged') if 'merged' in name else merge(pair(here), method='average')
    with refuses(Path(name).name, 'deep|digits'): run()

def test_a_large_file_is_not_read(here):
    with open(here/'b'/'config.json', 'wb') as f: f.truncate(10**12)
    assert 'has 1000000000000 bytes' in both(here)

@pytest.mark.parametrize('key,value', [('num_hidden_layers', 10**9), ('vocab_size', 10**12), ('hidden_size', 10**9), ('max_position_embeddings', 10**12), ('num_labels', 10**9), ('type_vocab_size', 10**10)])
def test_sizes_are_those_of_a_machine(key, value, here):
    path = here/'b'/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert f'`{key}` must be' in both(here)

def test_yaml_is_bounded(here):
    (here/'r.yml').write_text(hostile.LAUGHS+hostile.RECIPES[0])
    with refuses('r.yml', 'more than 1000000 entries'): run_recipe(here/'r.yml', here/'new')
    (here/'r.yml').write_text(hostile.RECIPES[0]+'options: &a {x: *a}')
    with refuses('r.yml', 'deep'): run_recipe(here/'r.yml', here/'new')
    (here/'a'/'README.md').write_text(f'---\nlicense: mit\n{hostile.LAUGHS}---\n')
    assert 'entries' in read_card(BertConfig(name_or_path=str(here/'a')))['error']

def test_numbers_are_bounded(here):
    "YAML counts in sixties: a few thousand characters are a number that Python cannot print."
    with refuses('r.yml', 'hundreds of digits'): parse_yaml('a: 1:'+'1:'*3000+'1', 'r.yml')

def test_an_alias_is_not_refused_for_being_one():
    assert parse_yaml('a: &a [x]\nb: *a', 'r.yml')==dict(a=['x'], b=['x'])

def test_messages_are_short_and_printable(here):
    path = here/'b'/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(hidden_size='\x1b[31m\n'+'x'*10**6)))
    said = both(here)
    assert len(said)<1000 and said.isprintable()


FISHERS = {'layer': (lambda o: {k.replace('heads.1', 'heads.7'): v for k, v in o.items()}, {}, 'expected tensors `heads.0` and so on|is damaged'), 'no layer': (lambda o: {'heads': o['heads.0'].clone(), **o}, {}, 'is not a saved|is damaged'),
           'deep': (dict, dict(meta='['*9999), 'nested too deeply'), 'long': (dict, dict(num_examples='9'*5000), 'a number `num_examples`'), 'large': (dict, dict(num_examples='x'*10**6), 'a number `num_examples`')}

@pytest.mark.parametrize('change,meta,says', FISHERS.values(), ids=FISHERS)
def test_a_file_of_fishers_is_named(change, meta, says, here):
    path = here/'b.fisher.safetensors'
    with hostile.safe_open(path, 'pt') as f: about = f.metadata()
    save_file(change(load_file(path)), path, about | meta)
    given = {t: here/f'{t}.fisher.safetensors' for t in 'ab'}
    for f in (lambda: merge(pair(here), given), lambda: merge_files(pair(here), given, out=here/'new')):
        with refuses('b.fisher.safetensors', says) as _: f()


# --- the card -------------------------------------------------------------------------------

NASTY = '<script>x</script> | `code` [link](http://x) *b* \\ &amp; \x1b[31m\u202e ~~s~~'

def test_the_card_shows_foreign_text_as_it_is_written(here):
    (here/'a'/'README.md').write_text('---\n'+json.dumps(dict(license='other', license_name=NASTY, license_link=f'x\n---\n# Evil\n{NASTY}', datasets=[NASTY], language='en'))+'\n---\n')
    merge(pair(here), method='average').save_pretrained(here/'new')
    card = (here/'new'/'README.md').read_text()
    front, text = card.split('\n---\n', 1)
    assert '# Evil\n' not in card and '\n# Evil' not in card and '<script>' not in text and '\x1b' not in card and '\u202e' not in text
    row = next(o for o in text.splitlines() if 'script' in o)
    assert row.startswith('| a |') and r'\`code\`' in row and r'\[link\]' in row and r'\|' in row and '&lt;script&gt;' in row
    assert all(len(o.replace(r'\|', '').split('|'))==5 for o in text.split('## Licence')[1].splitlines() if o.startswith('|'))
    assert parse_yaml(front.removeprefix('---\n'), 'README.md')['datasets'][0].startswith('<script>')


# --- two readers of one model ---------------------------------------------------------------

def rename(f): return lambda o: {f(n): t for n, t in o.items()}
NORM, QUERY = 'bert.embeddings.LayerNorm.weight', 'bert.encoder.layer.0.attention.self.query.weight'
def bare(n): return n.removeprefix('bert.')
def old(n): return n.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')

TWO_READERS = { # tensors in the file -> None where both read the same, else what both say
    'gamma and weight': (lambda o: o | {old(NORM): o[NORM]+1}, 'which is meant'),
    'prefix and bare': (lambda o: o | {bare(QUERY): o[QUERY]+1}, 'which is meant'),
    'gamma and bare weight': (lambda o: o | {bare(old(NORM)): o[NORM]+1}, 'which is meant'),
    'bare and twice the prefix': (lambda o: {bare(n): t for n, t in o.items()} | {f'bert.{QUERY}': o[QUERY]+1}, 'which is meant'),
    'twice the prefix': (lambda o: o | {f'bert.{QUERY}': o[QUERY]+1}, 'which is meant'),
    'module.': (rename('module.{}'.format), 'inside a wrapper'), '_orig_mod.': (rename('_orig_mod.{}'.format), 'inside a wrapper'),
    'float8': (lambda o: o | {QUERY: o[QUERY].to(torch.float8_e4m3fn)}, 'F8_E4M3'), 'complex': (lambda o: o | {QUERY: o[QUERY].to(torch.complex64)}, 'C64'),
    'int8': (lambda o: o | {QUERY: o[QUERY].to(torch.int8)}, 'I8'), 'bool': (lambda o: o | {NORM: o[NORM].to(torch.bool)}, 'BOOL'),
    'shape': (lambda o: o | {QUERY: o[QUERY][:-1].clone()}, r'query.weight has shape \[15, 16\], but config.json means \[16, 16\]'),
    'missing': (lambda o: {n: t for n, t in o.items() if n!=QUERY}, 'has no weights for .*query'),
    'old names': (rename(old), None), 'bare body': (rename(bare), None), 'one bare': (lambda o: {bare(n) if n==QUERY else n: t for n, t in o.items()}, None),
    'half': (lambda o: {n: t.half() for n, t in o.items()}, None), 'one half': (lambda o: o | {QUERY: o[QUERY].half()}, None), 'one double': (lambda o: o | {QUERY: o[QUERY].double()}, None),
    'bfloat16 head': (lambda o: o | {'classifier.weight': o['classifier.weight'].bfloat16()}, None), 'extra': (lambda o: o | {'lm_head.weight': torch.ones(3)}, None),
    'position numbers': (lambda o: o | {'bert.embeddings.position_ids': torch.arange(40)[None]}, None)}

@pytest.mark.parametrize('change,says', TWO_READERS.values(), ids=TWO_READERS)
@pytest.mark.parametrize('stated', [True, False], ids=['dtype stated', 'dtype not stated'])
def test_two_readers_agree(change, says, stated, here):
    if says == 'C64' and torch.complex64 not in safetensors.torch._SIZE: pytest.skip('this safetensors writes no complex numbers')
    path, config = here/'b'/'model.safetensors', here/'b'/'config.json'
    if not stated: config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if 'dtype' not in k}))
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path, dict(format='pt'))
    if says is not None:
        import re
        assert re.search(says, both(here))
        return
    merge(pair(here), method='average').save_pretrained(here/'one')
    merge_files(pair(here), method='average', out=here/'two')
    assert hostile.same(here/'one', here/'two')

def shards(here):
    (here/'b'/'model.safetensors').unlink()
    for o in (here/'b-shards').glob('model*'): shutil.copy(o, here/'b')
    return here/'b'/'model.safetensors.index.json'

def test_shards_are_read_alike(here):
    shards(here)
    hostile.both_ways(here)

def test_a_tensor_in_two_shards_is_refused(here):
    shards(here)
    first, second, *_ = sorted((here/'b').glob('model-*'))
    one = load_file(first)
    name = next(iter(one))
    save_file(load_file(second) | {name: one[name]+1}, second, dict(format='pt'))
    assert f'{name} stands in two of its files' in both(here)

def test_an_index_that_names_the_wrong_shard_is_refused(here):
    path = shards(here)
    table = json.loads(path.read_text())
    files = sorted(set(table['weight_map'].values()))
    table['weight_map'][next(n for n, f in table['weight_map'].items() if f==files[0])] = files[1]
    path.write_text(json.dumps(table))
    assert 'where it is not' in both(here)
