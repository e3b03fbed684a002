BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0005');
CREATE TABLE desired (
	name VARCHAR NOT NULL, 
	generation INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	format VARCHAR NOT NULL, 
	previous_number INTEGER, 
	previous_format VARCHAR, 
	changed_at DATETIME NOT NULL, 
	CONSTRAINT pk_desired PRIMARY KEY (name)
);
INSERT INTO "desired" VALUES('tuned',3,1,'merged',2,'merged','2026-11-26 12:49:55.193558');
CREATE TABLE drift_alarms (
	id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	format VARCHAR NOT NULL, 
	signal VARCHAR NOT NULL, 
	since DATETIME NOT NULL, 
	called_at DATETIME NOT NULL, 
	ended_at DATETIME, 
	moved VARCHAR NOT NULL, 
	examples VARCHAR NOT NULL, 
	CONSTRAINT pk_drift_alarms PRIMARY KEY (id)
);
CREATE TABLE drift_states (
	name VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	format VARCHAR NOT NULL, 
	signal VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	report VARCHAR NOT NULL, 
	checked_at DATETIME NOT NULL, 
	CONSTRAINT pk_drift_states PRIMARY KEY (name, number, format, signal)
);
CREATE TABLE feedback (
	request INTEGER NOT NULL, 
	given_at DATETIME NOT NULL, 
	rating VARCHAR NOT NULL, 
	label VARCHAR, 
	correction VARCHAR, 
	CONSTRAINT pk_feedback PRIMARY KEY (request), 
	CONSTRAINT fk_feedback_request FOREIGN KEY(request) REFERENCES requests (id) ON DELETE CASCADE
);
INSERT INTO "feedback" VALUES(1,'2026-11-26 12:49:55.199176','good',NULL,'a correction');
CREATE TABLE holdout_runs (
	id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	format VARCHAR NOT NULL, 
	engine VARCHAR NOT NULL, 
	cause VARCHAR NOT NULL, 
	started_at DATETIME NOT NULL, 
	ended_at DATETIME NOT NULL, 
	outcome VARCHAR NOT NULL, 
	reason VARCHAR, 
	results VARCHAR NOT NULL, 
	CONSTRAINT pk_holdout_runs PRIMARY KEY (id)
);
CREATE TABLE requests (
	id INTEGER NOT NULL, 
	request_id VARCHAR NOT NULL, 
	started_at DATETIME NOT NULL, 
	model VARCHAR NOT NULL, 
	number INTEGER, 
	format VARCHAR, 
	route VARCHAR NOT NULL, 
	key_id VARCHAR, 
	status INTEGER NOT NULL, 
	reason VARCHAR, 
	finish_reason VARCHAR, 
	seconds DOUBLE NOT NULL, 
	first_token_seconds DOUBLE, 
	tokens_in INTEGER, 
	tokens_out INTEGER, 
	prompt VARCHAR, 
	answer VARCHAR, 
	bytes INTEGER NOT NULL, temperature DOUBLE, max_tokens INTEGER, logprob DOUBLE, 
	CONSTRAINT pk_requests PRIMARY KEY (id)
);
INSERT INTO "requests" VALUES(1,'req-1','2026-01-02 12:00:00.000000','tuned',2,'merged','/v1/chat/completions',NULL,200,NULL,'stop',1.5,0.25,10,5,NULL,NULL,192,0.7,64,NULL);
CREATE TABLE retaken_probes (
	name VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	format VARCHAR NOT NULL, 
	engine VARCHAR NOT NULL, 
	probes VARCHAR NOT NULL, 
	CONSTRAINT pk_retaken_probes PRIMARY KEY (name, number, format, engine)
);
CREATE TABLE swap_steps (
	id INTEGER NOT NULL, 
	swap_id INTEGER NOT NULL, 
	at DATETIME NOT NULL, 
	text VARCHAR NOT NULL, 
	CONSTRAINT pk_swap_steps PRIMARY KEY (id), 
	CONSTRAINT fk_swap_steps_swap_id FOREIGN KEY(swap_id) REFERENCES swaps (id)
);
INSERT INTO "swap_steps" VALUES(1,1,'2026-11-26 12:49:55.189481','holding new requests, 3 running');
INSERT INTO "swap_steps" VALUES(2,1,'2026-11-26 12:49:55.190578','held requests for 1.50 s, 7 of them');
CREATE TABLE swaps (
	id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	generation INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	format VARCHAR NOT NULL, 
	started_at DATETIME NOT NULL, 
	outcome VARCHAR, 
	reason VARCHAR, 
	seconds DOUBLE, 
	running INTEGER, 
	held INTEGER, kind VARCHAR, took_s DOUBLE, 
	CONSTRAINT pk_swaps PRIMARY KEY (id)
);
INSERT INTO "swaps" VALUES(1,'tuned',2,2,'merged','2026-11-26 12:49:55.187959','succeeded',NULL,1.5,3,7,'inplace',2.5);
INSERT INTO "swaps" VALUES(2,'tuned',3,1,'merged','2026-11-26 12:49:55.195125',NULL,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE INDEX ix_swap_steps_swap_id ON swap_steps (swap_id);
CREATE INDEX ix_requests_request_id ON requests (request_id);
CREATE INDEX ix_requests_started_at ON requests (started_at);
COMMIT;
