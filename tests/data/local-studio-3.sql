PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
CREATE TABLE files (
    file_id TEXT PRIMARY KEY, media_type TEXT NOT NULL, created_at REAL NOT NULL, key TEXT NOT NULL DEFAULT '');
INSERT INTO "files" VALUES('input','image/png',1764000000.0,'input-caed10f440b0a12c.png');
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT UNIQUE NOT NULL, model TEXT NOT NULL,
    task TEXT NOT NULL, model_source TEXT NOT NULL, created_at REAL NOT NULL, game_id TEXT NOT NULL,
    asset_name TEXT NOT NULL, vram_gb_estimate REAL NOT NULL, max_attempts INTEGER NOT NULL,
    status TEXT NOT NULL, attempts INTEGER NOT NULL, reason TEXT, worker_id TEXT,
    dropped_by TEXT, rejections TEXT NOT NULL, offered_at REAL, started_at REAL,
    finished_at REAL, completions INTEGER NOT NULL CHECK (completions <= 1),
    refused_uploads INTEGER NOT NULL, priority INTEGER NOT NULL DEFAULT 0, submitter TEXT NOT NULL DEFAULT '', passed_at REAL);
INSERT INTO "jobs" VALUES(1,'done','placeholder','{"kind": "image", "prompt": "a fox"}','{"engine": "synthetic", "files": [], "cliDefaults": {}}',1764000100.0,'local','picture',0.0,3,'done',1,NULL,'worker-1',NULL,'{}',1764000200.0,1764000200.0,1764000205.0,1,0,0,'',NULL);
INSERT INTO "jobs" VALUES(2,'failed','placeholder','{"kind": "image", "prompt": "a fox"}','{"engine": "synthetic", "files": [], "cliDefaults": {}}',1764000101.0,'local','picture',0.0,3,'failed',1,'no such engine','worker-1',NULL,'{}',1764000205.0,NULL,1764000205.0,0,0,0,'',NULL);
INSERT INTO "jobs" VALUES(3,'waiting','placeholder','{"kind": "image", "prompt": "a fox"}','{"engine": "synthetic", "files": [], "cliDefaults": {}}',1764000102.0,'local','picture',0.0,3,'queued',0,NULL,NULL,NULL,'{}',1764000205.0,NULL,NULL,0,0,0,'',NULL);
INSERT INTO "jobs" VALUES(4,'rejected','placeholder','{"kind": "image", "prompt": "a fox"}','{"engine": "synthetic", "files": [], "cliDefaults": {}}',1764000103.0,'local','picture',0.0,3,'queued',0,NULL,NULL,NULL,'{"worker-1":{"reason":"needs 40 GB, \"they\" say","name":"worker-1","at":0,"times":1}}',NULL,NULL,NULL,0,0,0,'',NULL);
CREATE TABLE last_made (worker_id TEXT PRIMARY KEY, model TEXT NOT NULL);
CREATE TABLE logs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, worker_id TEXT NOT NULL, ts TEXT NOT NULL, level TEXT NOT NULL,
    category TEXT NOT NULL, message TEXT NOT NULL, job_id TEXT);
INSERT INTO "logs" VALUES(1,'worker-1','2025-11-24T16:00:00.000Z','info','engine','a line of then',NULL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "meta" VALUES('salt','000443ccc8df239f5a95c70977488633a8b4637ddef311e153f102ad9aef32dc');
CREATE TABLE models (
    model_id TEXT PRIMARY KEY, label TEXT NOT NULL, model_source TEXT NOT NULL,
    vram_gb_estimate REAL NOT NULL);
INSERT INTO "models" VALUES('placeholder','Placeholder pictures (no model files)','{"engine": "synthetic", "files": [], "cliDefaults": {}}',0.0);
CREATE TABLE registrations (
    request_id TEXT PRIMARY KEY, install_id TEXT NOT NULL, secret_hash TEXT NOT NULL,
    capabilities TEXT NOT NULL, user_agent TEXT NOT NULL, status TEXT NOT NULL, reason TEXT,
    worker_id TEXT, created_at REAL NOT NULL, decided_at REAL);
INSERT INTO "registrations" VALUES('request','install','00','{"machineName":"attic","username":"painter","agentVersion":"0.5.0","engine":"multi","vramTotalGb":24.0,"vramThresholdGb":20.0,"autoEnabled":true,"autoStart":true,"supportedModels":["sd-cpp:*"],"taskKinds":["image"],"supportedModelsPerKind":{"image":["sd-cpp:*"]}}','studio-worker/0.5.0','approved',NULL,'worker-1',1764000000.0,1764000060.0);
CREATE TABLE results (
    job_id TEXT PRIMARY KEY REFERENCES jobs (job_id), ext TEXT NOT NULL, prompt TEXT NOT NULL,
    generation_meta TEXT, worker_id TEXT NOT NULL, seconds REAL NOT NULL, created_at REAL NOT NULL,
    size_bytes INTEGER NOT NULL, key TEXT NOT NULL DEFAULT '');
INSERT INTO "results" VALUES('done','webp','a fox','{"seed": 7}','worker-1',5.0,1764000205.0,25,'done-5d0776fa846e7ebc.webp');
CREATE TABLE turns (
    priority INTEGER NOT NULL, submitter TEXT NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (priority, submitter));
CREATE TABLE workers (
    worker_id TEXT PRIMARY KEY, install_id TEXT NOT NULL, request_id TEXT NOT NULL, token_hash TEXT,
    capabilities TEXT NOT NULL, created_at REAL NOT NULL, last_seen_at REAL, deleted_at REAL);
INSERT INTO "workers" VALUES('worker-1','install','request',NULL,'{"machineName":"attic","username":"painter","agentVersion":"0.5.0","engine":"multi","vramTotalGb":24.0,"vramThresholdGb":20.0,"autoEnabled":true,"autoStart":true,"supportedModels":["sd-cpp:*"],"taskKinds":["image"],"supportedModelsPerKind":{"image":["sd-cpp:*"]}}',1764000060.0,1764000100.0,NULL);
CREATE INDEX registrations_by_install ON registrations (install_id, created_at);
CREATE INDEX jobs_by_end ON jobs (status, finished_at, seq);
CREATE INDEX jobs_by_line ON jobs (status, priority, submitter, seq);
CREATE INDEX jobs_not_rejected ON jobs (status, priority, submitter, model, seq, rejections)
    WHERE rejections = '{}';
CREATE INDEX jobs_rejected ON jobs (status, seq) WHERE rejections <> '{}';
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',4);
COMMIT;
PRAGMA user_version = 3;
