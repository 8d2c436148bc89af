"""A stand-in for the Hub, on this machine: `conftest.py` has a fixture of it."""
import base64
import hashlib
import json
import re
from pathlib import Path
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Hub(ThreadingHTTPServer):
    "As much of the Hub as an upload, a download and their failures need; one user, one token."
    def __init__(self): super().__init__(('127.0.0.1', 0), Handler); self.repos, self.lfs, self.log, self.sizes = {}, {}, [], []
    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}'

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def answer(self, value=None, status=200, data=None, **headers):
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for k, v in (dict(content_type='application/json', content_length=len(data)) | headers).items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(data)

    def do_any(self):
        size = self.headers.get('Content-Length')
        data, path = self.rfile.read(int(size)) if size else b'', self.path.split('?')[0]
        self.server.log.append((self.command, path))
        if path.startswith('/lfs/'): return self.lfs(path[5:], data)
        known = self.headers.get('Authorization')=='Bearer good'
        if not known: return self.answer(dict(error='Invalid credentials in Authorization header'), 401)
        for pattern, call in ROUTES:
            if m := re.fullmatch(pattern, path): return call(self, data, *m.groups())
        self.answer(dict(error=f'no route {path}'), 404)
    do_GET = do_POST = do_PUT = do_HEAD = do_any

    def lfs(self, oid, data):
        assert hashlib.sha256(data).hexdigest()==oid
        self.server.lfs[oid] = data
        self.answer({})
    def whoami(self, data): self.answer(dict(name='me', type='user', orgs=[]))
    def create(self, data):
        o = json.loads(data)
        name = f'{o.get("organization") or "me"}/{o["name"]}'
        if not name.startswith('me/'): return self.answer(dict(error="You don't have the rights to create a model under this namespace"), 403)
        status = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(name, dict(private=o.get('private') or o.get('visibility')=='private', commits=[], branches=['main'], files={}))
        self.answer(dict(url=f'{self.server.url}/{name}', name=name, id=name), status)
    def branch(self, data, name, branch): self.server.repos[name]['branches'].append(branch); self.answer({})
    def yaml(self, data): self.answer(dict(errors=[], warnings=[]))
    def preupload(self, data, name, branch):
        lfs = lambda o: 'lfs' if o['path'].endswith('.safetensors') else 'regular'
        self.answer(dict(files=[dict(path=o['path'], uploadMode=lfs(o), shouldIgnore=False, oid=None) for o in json.loads(data)['files']]))
    def batch(self, data, name):
        href = lambda o: {} if o['oid'] in self.server.lfs else dict(actions=dict(upload=dict(href=f'{self.server.url}/lfs/{o["oid"]}')))
        self.answer(dict(transfer='basic', objects=[dict(oid=o['oid'], size=o['size'], **href(o)) for o in json.loads(data)['objects']]), content_type='application/vnd.git-lfs+json')
    def commit(self, data, name, branch):
        lines = [json.loads(o) for o in data.splitlines()]
        files = {o['value']['path']: self.server.lfs[o['value']['oid']] if o['key']=='lfsFile' else base64.b64decode(o['value']['content'])
                 for o in lines if o['key'] in ('file', 'lfsFile')}
        repo = self.server.repos[name]
        repo['files'] |= files
        repo['commits'].append((branch, lines[0]['value']['summary'], sorted(files)))
        sha = hashlib.sha1(data).hexdigest()
        repo['sha'] = sha
        self.answer(dict(success=True, commitOid=sha, commitUrl=f'{self.server.url}/{name}/commit/{sha}', hookOutput=''))
    def info(self, data, name, revision=None):
        if name not in self.server.repos: return self.answer(dict(error='Repository not found'), 404, X_Error_Code='RepoNotFound')
        repo = self.server.repos[name]
        self.answer(dict(id=name, sha=repo['sha'], siblings=[dict(rfilename=o) for o in repo['files']], private=False, tags=[], downloads=0, likes=0))
    def tree(self, data, name, revision):
        self.answer([dict(type='file', path=k, size=len(v), oid=hashlib.sha1(v).hexdigest()) for k, v in self.server.repos[name]['files'].items()])
    def resolve(self, data, name, revision, file):
        repo = self.server.repos.get(name)
        if repo is None or file not in repo['files']: return self.answer({}, 404, X_Error_Code='EntryNotFound' if repo else 'RepoNotFound', X_Repo_Commit=(repo or {}).get('sha', ''))
        v = repo['files'][file]
        self.answer(data=v, ETag=f'"{hashlib.sha1(v).hexdigest()}"', X_Repo_Commit=repo['sha'], Accept_Ranges='bytes')

NAME = r'([\w.-]+/[\w.-]+)'
ROUTES = [(r'/api/whoami-v2', Handler.whoami), (r'/api/repos/create', Handler.create), (r'/api/validate-yaml', Handler.yaml),
          (rf'/api/models/{NAME}/branch/(.+)', Handler.branch), (rf'/api/models/{NAME}/preupload/(.+)', Handler.preupload),
          (rf'/{NAME}\.git/info/lfs/objects/batch', Handler.batch), (rf'/api/models/{NAME}/commit/(.+)', Handler.commit),
          (rf'/api/models/{NAME}/revision/(.+)', Handler.info), (rf'/api/models/{NAME}', Handler.info),
          (rf'/api/models/{NAME}/tree/([^/]+)', Handler.tree), (rf'/{NAME}/resolve/([^/]+)/(.+)', Handler.resolve)]

def cached_data(cache, name, splits, config='default'):
    "What `load_dataset(name, config)` leaves in its cache, made from `datasets` themselves: split -> `Dataset`."
    from datasets import DatasetDict, load_dataset
    repo, owner, short = cache/'made', *name.split('/')
    for k, ds in DatasetDict(splits).items(): ds.to_parquet(str(repo/f'{k}-00000-of-00001.parquet'))
    files = {k: str(repo/f'{k}-*.parquet') for k in splits}
    found = load_dataset('parquet', config, data_files=files, cache_dir=str(cache/'prepared'))
    info, = {Path(o['filename']).parent for v in found.values() for o in v.cache_files}
    target = cache/f'{owner}___{short}'/config/'0.0.0'/('b'*40)
    target.mkdir(parents=True)
    for file in info.iterdir():
        data = file.read_bytes()
        if file.name=='dataset_info.json': data = json.dumps(json.loads(data) | dict(config_name=config, dataset_name=short)).encode()
        (target/file.name.replace('parquet-', f'{short}-')).write_bytes(data)
