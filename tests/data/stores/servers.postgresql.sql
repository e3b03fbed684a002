SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
CREATE FUNCTION public.refuse_audit_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN RAISE integrity_constraint_violation USING MESSAGE = 'the audit log is append-only'; END $$;
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE public.audit (
    id bigint NOT NULL,
    at character varying NOT NULL,
    action character varying NOT NULL,
    subject character varying NOT NULL,
    actor character varying NOT NULL,
    origin character varying NOT NULL,
    reason character varying,
    details character varying NOT NULL,
    previous_hash character varying NOT NULL,
    hash character varying NOT NULL
);
CREATE TABLE public.deployments (
    name character varying NOT NULL,
    added_at timestamp with time zone NOT NULL
);
CREATE TABLE public.desired (
    name character varying NOT NULL,
    generation bigint NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    previous_number bigint,
    previous_format character varying,
    changed_at timestamp with time zone NOT NULL,
    forced character varying
);
CREATE TABLE public.drift_alarms (
    id bigint NOT NULL,
    name character varying NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    signal character varying NOT NULL,
    feature character varying NOT NULL,
    since timestamp with time zone NOT NULL,
    called_at timestamp with time zone NOT NULL,
    ended_at timestamp with time zone,
    moved character varying NOT NULL,
    examples character varying NOT NULL
);
CREATE SEQUENCE public.drift_alarms_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.drift_alarms_id_seq OWNED BY public.drift_alarms.id;
CREATE TABLE public.drift_baselines (
    name character varying NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    data bytea NOT NULL
);
CREATE TABLE public.drift_items (
    id bigint NOT NULL,
    request bigint NOT NULL,
    name character varying NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    features character varying NOT NULL,
    topic bytea NOT NULL,
    wanted bytea NOT NULL,
    words bytea NOT NULL,
    conversation bigint NOT NULL
);
CREATE SEQUENCE public.drift_items_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.drift_items_id_seq OWNED BY public.drift_items.id;
CREATE TABLE public.drift_states (
    name character varying NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    signal character varying NOT NULL,
    state character varying NOT NULL,
    report character varying NOT NULL,
    checked_at timestamp with time zone NOT NULL
);
CREATE TABLE public.feedback (
    request bigint NOT NULL,
    given_at timestamp with time zone NOT NULL,
    rating character varying NOT NULL,
    label character varying,
    correction character varying
);
CREATE TABLE public.holdout_runs (
    id bigint NOT NULL,
    name character varying NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    engine character varying NOT NULL,
    cause character varying NOT NULL,
    started_at timestamp with time zone NOT NULL,
    ended_at timestamp with time zone NOT NULL,
    outcome character varying NOT NULL,
    reason character varying,
    results character varying NOT NULL
);
CREATE SEQUENCE public.holdout_runs_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.holdout_runs_id_seq OWNED BY public.holdout_runs.id;
CREATE TABLE public.keys (
    id character varying NOT NULL,
    revision bigint NOT NULL,
    name character varying NOT NULL,
    hash character varying NOT NULL,
    scopes character varying NOT NULL,
    models character varying,
    requests_per_minute bigint,
    tokens_in_per_minute bigint,
    tokens_out_per_minute bigint,
    concurrent bigint,
    tokens_per_day bigint,
    weight bigint NOT NULL,
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    previous_hash character varying,
    previous_until timestamp with time zone
);
CREATE TABLE public.leases (
    name character varying NOT NULL,
    holder character varying NOT NULL,
    generation bigint NOT NULL,
    until timestamp with time zone NOT NULL
);
CREATE TABLE public.requests (
    id bigint NOT NULL,
    request_id character varying NOT NULL,
    started_at timestamp with time zone NOT NULL,
    model character varying NOT NULL,
    number bigint,
    format character varying,
    route character varying NOT NULL,
    key_id character varying,
    status bigint NOT NULL,
    reason character varying,
    finish_reason character varying,
    seconds double precision NOT NULL,
    first_token_seconds double precision,
    tokens_in bigint,
    tokens_out bigint,
    prompt character varying,
    answer character varying,
    bytes bigint NOT NULL,
    temperature double precision,
    max_tokens bigint,
    logprob double precision,
    client_request_id character varying,
    outcome character varying NOT NULL,
    user_hash character varying,
    unit character varying,
    valid boolean
);
CREATE SEQUENCE public.requests_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.requests_id_seq OWNED BY public.requests.id;
CREATE TABLE public.retaken_probes (
    name character varying NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    engine character varying NOT NULL,
    probes character varying NOT NULL
);
CREATE TABLE public.rollout_steps (
    id bigint NOT NULL,
    rollout_id bigint NOT NULL,
    at timestamp with time zone NOT NULL,
    text character varying NOT NULL
);
CREATE SEQUENCE public.rollout_steps_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.rollout_steps_id_seq OWNED BY public.rollout_steps.id;
CREATE TABLE public.rollouts (
    id bigint NOT NULL,
    name character varying NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    previous_number bigint NOT NULL,
    previous_format character varying NOT NULL,
    generation bigint NOT NULL,
    plan character varying NOT NULL,
    state character varying NOT NULL,
    step bigint NOT NULL,
    requested_at timestamp with time zone NOT NULL,
    step_began_at timestamp with time zone NOT NULL,
    actor character varying NOT NULL,
    origin character varying NOT NULL,
    reason character varying,
    forced character varying,
    stop character varying,
    ended_at timestamp with time zone,
    outcome character varying,
    why character varying,
    signals character varying NOT NULL,
    gates character varying NOT NULL
);
CREATE SEQUENCE public.rollouts_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.rollouts_id_seq OWNED BY public.rollouts.id;
CREATE TABLE public.served (
    id bigint NOT NULL,
    server character varying DEFAULT ''::character varying NOT NULL,
    name character varying NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    generation bigint NOT NULL,
    began_at timestamp with time zone NOT NULL,
    began_by character varying NOT NULL,
    ended_at timestamp with time zone,
    ended_by character varying
);
CREATE SEQUENCE public.served_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.served_id_seq OWNED BY public.served.id;
CREATE TABLE public.servers (
    id character varying NOT NULL,
    address character varying NOT NULL,
    started_at timestamp with time zone NOT NULL,
    seen_at timestamp with time zone NOT NULL
);
CREATE TABLE public.shadow_pairs (
    id bigint NOT NULL,
    rollout_id bigint NOT NULL,
    at timestamp with time zone NOT NULL,
    unit character varying NOT NULL,
    production_failed boolean NOT NULL,
    candidate_failed boolean NOT NULL,
    production_valid boolean,
    candidate_valid boolean,
    agrees boolean,
    production_finish character varying,
    candidate_finish character varying,
    production_tokens bigint,
    candidate_tokens bigint,
    production_seconds double precision NOT NULL,
    candidate_seconds double precision NOT NULL,
    production_logprob double precision,
    candidate_logprob double precision,
    replayed bigint
);
CREATE SEQUENCE public.shadow_pairs_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.shadow_pairs_id_seq OWNED BY public.shadow_pairs.id;
CREATE TABLE public.swap_steps (
    id bigint NOT NULL,
    swap_id bigint NOT NULL,
    at timestamp with time zone NOT NULL,
    text character varying NOT NULL
);
CREATE SEQUENCE public.swap_steps_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.swap_steps_id_seq OWNED BY public.swap_steps.id;
CREATE TABLE public.swaps (
    id bigint NOT NULL,
    server character varying DEFAULT ''::character varying NOT NULL,
    name character varying NOT NULL,
    generation bigint NOT NULL,
    number bigint NOT NULL,
    format character varying NOT NULL,
    started_at timestamp with time zone NOT NULL,
    outcome character varying,
    reason character varying,
    queued_s double precision,
    running bigint,
    queued bigint,
    kind character varying,
    took_s double precision
);
CREATE SEQUENCE public.swaps_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.swaps_id_seq OWNED BY public.swaps.id;
CREATE TABLE public.tuneserve_alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.usage (
    hour timestamp with time zone NOT NULL,
    key_id character varying NOT NULL,
    model character varying NOT NULL,
    requests bigint NOT NULL,
    tokens_in bigint NOT NULL,
    tokens_out bigint NOT NULL
);
CREATE TABLE public.webhook_deliveries (
    id bigint NOT NULL,
    message character varying NOT NULL,
    url character varying NOT NULL,
    body character varying NOT NULL,
    created_at timestamp with time zone NOT NULL,
    attempts bigint NOT NULL,
    due_at timestamp with time zone NOT NULL
);
CREATE SEQUENCE public.webhook_deliveries_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.webhook_deliveries_id_seq OWNED BY public.webhook_deliveries.id;
ALTER TABLE ONLY public.drift_alarms ALTER COLUMN id SET DEFAULT nextval('public.drift_alarms_id_seq'::regclass);
ALTER TABLE ONLY public.drift_items ALTER COLUMN id SET DEFAULT nextval('public.drift_items_id_seq'::regclass);
ALTER TABLE ONLY public.holdout_runs ALTER COLUMN id SET DEFAULT nextval('public.holdout_runs_id_seq'::regclass);
ALTER TABLE ONLY public.requests ALTER COLUMN id SET DEFAULT nextval('public.requests_id_seq'::regclass);
ALTER TABLE ONLY public.rollout_steps ALTER COLUMN id SET DEFAULT nextval('public.rollout_steps_id_seq'::regclass);
ALTER TABLE ONLY public.rollouts ALTER COLUMN id SET DEFAULT nextval('public.rollouts_id_seq'::regclass);
ALTER TABLE ONLY public.served ALTER COLUMN id SET DEFAULT nextval('public.served_id_seq'::regclass);
ALTER TABLE ONLY public.shadow_pairs ALTER COLUMN id SET DEFAULT nextval('public.shadow_pairs_id_seq'::regclass);
ALTER TABLE ONLY public.swap_steps ALTER COLUMN id SET DEFAULT nextval('public.swap_steps_id_seq'::regclass);
ALTER TABLE ONLY public.swaps ALTER COLUMN id SET DEFAULT nextval('public.swaps_id_seq'::regclass);
ALTER TABLE ONLY public.webhook_deliveries ALTER COLUMN id SET DEFAULT nextval('public.webhook_deliveries_id_seq'::regclass);
INSERT INTO public.audit VALUES (1, '2026-11-30T22:54:47.989858+00:00', 'gc', 'runs/0', 'user:alice', 'box', NULL, '{}', '0000000000000000000000000000000000000000000000000000000000000000', 'c149f7d7cc564e354de4552ddf47990a0ef2d6d6e9cd53025acfeb6d836025d1');
INSERT INTO public.audit VALUES (2, '2026-11-30T22:54:48.028020+00:00', 'gc', 'runs/1', 'user:alice', 'box', NULL, '{}', 'c149f7d7cc564e354de4552ddf47990a0ef2d6d6e9cd53025acfeb6d836025d1', 'a267c1dd1c23fc9faab2885365122092e592bf2c4cd30832b2f192551e97a24e');
INSERT INTO public.audit VALUES (3, '2026-11-30T22:54:48.038962+00:00', 'gc', 'runs/2', 'user:alice', 'box', NULL, '{}', 'a267c1dd1c23fc9faab2885365122092e592bf2c4cd30832b2f192551e97a24e', '18d7e49e30de44dd4607bef248718f523b6f76fdd7f4b13621a07759df09eed8');
INSERT INTO public.audit VALUES (4, '2026-11-30T22:54:48.065242+00:00', 'gc', 'runs/3', 'user:alice', 'box', NULL, '{}', '18d7e49e30de44dd4607bef248718f523b6f76fdd7f4b13621a07759df09eed8', '5548091874ff3258e585ddd8c13bbfbb7fcf436e12fac0b048b42cbaa72c6fff');
INSERT INTO public.audit VALUES (5, '2026-11-30T22:54:48.074313+00:00', 'gc', 'runs/4', 'user:alice', 'box', NULL, '{}', '5548091874ff3258e585ddd8c13bbfbb7fcf436e12fac0b048b42cbaa72c6fff', 'ef9e9e841a34d5a62e0819ab53c3de3ca4711711de6fc469a6a261dc90c63e01');
INSERT INTO public.deployments VALUES ('plain name', '2026-03-29 07:29:59.999999+05:30');
INSERT INTO public.deployments VALUES ('B before a, as bytes name', '2026-03-30 07:29:59.999999+05:30');
INSERT INTO public.deployments VALUES ('a name', '2026-03-31 07:29:59.999999+05:30');
INSERT INTO public.deployments VALUES ('ünïcode 😀 name', '2026-04-01 07:29:59.999999+05:30');
INSERT INTO public.deployments VALUES ('line
break ''quoted'' \ %s :x name', '2026-04-02 07:29:59.999999+05:30');
INSERT INTO public.desired VALUES ('plain name', -4611686018427387904, -4611686018427387904, 'plain format', NULL, NULL, '2026-03-29 07:29:59.999999+05:30', NULL);
INSERT INTO public.desired VALUES ('B before a, as bytes name', -2305843009213693952, -2305843009213693952, 'B before a, as bytes format', -2305843009213693952, 'B before a, as bytes previous_format', '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes forced');
INSERT INTO public.desired VALUES ('a name', 0, 0, 'a format', 0, 'a previous_format', '2026-03-31 07:29:59.999999+05:30', 'a forced');
INSERT INTO public.desired VALUES ('ünïcode 😀 name', 2305843009213693952, 2305843009213693952, 'ünïcode 😀 format', 2305843009213693952, 'ünïcode 😀 previous_format', '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 forced');
INSERT INTO public.desired VALUES ('line
break ''quoted'' \ %s :x name', 4611686018427387904, 4611686018427387904, 'line
break ''quoted'' \ %s :x format', 4611686018427387904, 'line
break ''quoted'' \ %s :x previous_format', '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x forced');
INSERT INTO public.drift_alarms VALUES (7, 'plain name', -4611686018427387904, 'plain format', 'plain signal', 'plain feature', '2026-03-29 07:29:59.999999+05:30', '2026-03-29 07:29:59.999999+05:30', NULL, 'plain moved', 'plain examples');
INSERT INTO public.drift_alarms VALUES (14, 'B before a, as bytes name', -2305843009213693952, 'B before a, as bytes format', 'B before a, as bytes signal', 'B before a, as bytes feature', '2026-03-30 07:29:59.999999+05:30', '2026-03-30 07:29:59.999999+05:30', '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes moved', 'B before a, as bytes examples');
INSERT INTO public.drift_alarms VALUES (21, 'a name', 0, 'a format', 'a signal', 'a feature', '2026-03-31 07:29:59.999999+05:30', '2026-03-31 07:29:59.999999+05:30', '2026-03-31 07:29:59.999999+05:30', 'a moved', 'a examples');
INSERT INTO public.drift_alarms VALUES (28, 'ünïcode 😀 name', 2305843009213693952, 'ünïcode 😀 format', 'ünïcode 😀 signal', 'ünïcode 😀 feature', '2026-04-01 07:29:59.999999+05:30', '2026-04-01 07:29:59.999999+05:30', '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 moved', 'ünïcode 😀 examples');
INSERT INTO public.drift_alarms VALUES (35, 'line
break ''quoted'' \ %s :x name', 4611686018427387904, 'line
break ''quoted'' \ %s :x format', 'line
break ''quoted'' \ %s :x signal', 'line
break ''quoted'' \ %s :x feature', '2026-04-02 07:29:59.999999+05:30', '2026-04-02 07:29:59.999999+05:30', '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x moved', 'line
break ''quoted'' \ %s :x examples');
INSERT INTO public.drift_baselines VALUES ('plain name', -4611686018427387904, 'plain format', '\x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff');
INSERT INTO public.drift_baselines VALUES ('B before a, as bytes name', -2305843009213693952, 'B before a, as bytes format', '\x0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff');
INSERT INTO public.drift_baselines VALUES ('a name', 0, 'a format', '\x02030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff');
INSERT INTO public.drift_baselines VALUES ('ünïcode 😀 name', 2305843009213693952, 'ünïcode 😀 format', '\x030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff');
INSERT INTO public.drift_baselines VALUES ('line
break ''quoted'' \ %s :x name', 4611686018427387904, 'line
break ''quoted'' \ %s :x format', '\x0405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff');
INSERT INTO public.drift_items VALUES (7, 7, 'plain name', -4611686018427387904, 'plain format', 'plain features', '\x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', -4611686018427387904);
INSERT INTO public.drift_items VALUES (14, 14, 'B before a, as bytes name', -2305843009213693952, 'B before a, as bytes format', 'B before a, as bytes features', '\x0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', -2305843009213693952);
INSERT INTO public.drift_items VALUES (21, 21, 'a name', 0, 'a format', 'a features', '\x02030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x02030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x02030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', 0);
INSERT INTO public.drift_items VALUES (28, 28, 'ünïcode 😀 name', 2305843009213693952, 'ünïcode 😀 format', 'ünïcode 😀 features', '\x030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', 2305843009213693952);
INSERT INTO public.drift_items VALUES (35, 35, 'line
break ''quoted'' \ %s :x name', 4611686018427387904, 'line
break ''quoted'' \ %s :x format', 'line
break ''quoted'' \ %s :x features', '\x0405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x0405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', '\x0405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff', 4611686018427387904);
INSERT INTO public.drift_states VALUES ('plain name', -4611686018427387904, 'plain format', 'plain signal', 'plain state', 'plain report', '2026-03-29 07:29:59.999999+05:30');
INSERT INTO public.drift_states VALUES ('B before a, as bytes name', -2305843009213693952, 'B before a, as bytes format', 'B before a, as bytes signal', 'B before a, as bytes state', 'B before a, as bytes report', '2026-03-30 07:29:59.999999+05:30');
INSERT INTO public.drift_states VALUES ('a name', 0, 'a format', 'a signal', 'a state', 'a report', '2026-03-31 07:29:59.999999+05:30');
INSERT INTO public.drift_states VALUES ('ünïcode 😀 name', 2305843009213693952, 'ünïcode 😀 format', 'ünïcode 😀 signal', 'ünïcode 😀 state', 'ünïcode 😀 report', '2026-04-01 07:29:59.999999+05:30');
INSERT INTO public.drift_states VALUES ('line
break ''quoted'' \ %s :x name', 4611686018427387904, 'line
break ''quoted'' \ %s :x format', 'line
break ''quoted'' \ %s :x signal', 'line
break ''quoted'' \ %s :x state', 'line
break ''quoted'' \ %s :x report', '2026-04-02 07:29:59.999999+05:30');
INSERT INTO public.feedback VALUES (7, '2026-03-29 07:29:59.999999+05:30', 'plain rating', NULL, NULL);
INSERT INTO public.feedback VALUES (14, '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes rating', 'B before a, as bytes label', 'B before a, as bytes correction');
INSERT INTO public.feedback VALUES (21, '2026-03-31 07:29:59.999999+05:30', 'a rating', 'a label', 'a correction');
INSERT INTO public.feedback VALUES (28, '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 rating', 'ünïcode 😀 label', 'ünïcode 😀 correction');
INSERT INTO public.feedback VALUES (35, '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x rating', 'line
break ''quoted'' \ %s :x label', 'line
break ''quoted'' \ %s :x correction');
INSERT INTO public.holdout_runs VALUES (7, 'plain name', -4611686018427387904, 'plain format', 'plain engine', 'plain cause', '2026-03-29 07:29:59.999999+05:30', '2026-03-29 07:29:59.999999+05:30', 'plain outcome', NULL, 'plain results');
INSERT INTO public.holdout_runs VALUES (14, 'B before a, as bytes name', -2305843009213693952, 'B before a, as bytes format', 'B before a, as bytes engine', 'B before a, as bytes cause', '2026-03-30 07:29:59.999999+05:30', '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes outcome', 'B before a, as bytes reason', 'B before a, as bytes results');
INSERT INTO public.holdout_runs VALUES (21, 'a name', 0, 'a format', 'a engine', 'a cause', '2026-03-31 07:29:59.999999+05:30', '2026-03-31 07:29:59.999999+05:30', 'a outcome', 'a reason', 'a results');
INSERT INTO public.holdout_runs VALUES (28, 'ünïcode 😀 name', 2305843009213693952, 'ünïcode 😀 format', 'ünïcode 😀 engine', 'ünïcode 😀 cause', '2026-04-01 07:29:59.999999+05:30', '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 outcome', 'ünïcode 😀 reason', 'ünïcode 😀 results');
INSERT INTO public.holdout_runs VALUES (35, 'line
break ''quoted'' \ %s :x name', 4611686018427387904, 'line
break ''quoted'' \ %s :x format', 'line
break ''quoted'' \ %s :x engine', 'line
break ''quoted'' \ %s :x cause', '2026-04-02 07:29:59.999999+05:30', '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x outcome', 'line
break ''quoted'' \ %s :x reason', 'line
break ''quoted'' \ %s :x results');
INSERT INTO public.keys VALUES ('plain id', -4611686018427387904, 'plain name', 'plain hash', 'plain scopes', NULL, NULL, NULL, NULL, NULL, NULL, -4611686018427387904, '2026-03-29 07:29:59.999999+05:30', NULL, NULL, NULL, NULL);
INSERT INTO public.keys VALUES ('B before a, as bytes id', -2305843009213693952, 'B before a, as bytes name', 'B before a, as bytes hash', 'B before a, as bytes scopes', 'B before a, as bytes models', -2305843009213693952, -2305843009213693952, -2305843009213693952, -2305843009213693952, -2305843009213693952, -2305843009213693952, '2026-03-30 07:29:59.999999+05:30', '2026-03-30 07:29:59.999999+05:30', '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes previous_hash', '2026-03-30 07:29:59.999999+05:30');
INSERT INTO public.keys VALUES ('a id', 0, 'a name', 'a hash', 'a scopes', 'a models', 0, 0, 0, 0, 0, 0, '2026-03-31 07:29:59.999999+05:30', '2026-03-31 07:29:59.999999+05:30', '2026-03-31 07:29:59.999999+05:30', 'a previous_hash', '2026-03-31 07:29:59.999999+05:30');
INSERT INTO public.keys VALUES ('ünïcode 😀 id', 2305843009213693952, 'ünïcode 😀 name', 'ünïcode 😀 hash', 'ünïcode 😀 scopes', 'ünïcode 😀 models', 2305843009213693952, 2305843009213693952, 2305843009213693952, 2305843009213693952, 2305843009213693952, 2305843009213693952, '2026-04-01 07:29:59.999999+05:30', '2026-04-01 07:29:59.999999+05:30', '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 previous_hash', '2026-04-01 07:29:59.999999+05:30');
INSERT INTO public.keys VALUES ('line
break ''quoted'' \ %s :x id', 4611686018427387904, 'line
break ''quoted'' \ %s :x name', 'line
break ''quoted'' \ %s :x hash', 'line
break ''quoted'' \ %s :x scopes', 'line
break ''quoted'' \ %s :x models', 4611686018427387904, 4611686018427387904, 4611686018427387904, 4611686018427387904, 4611686018427387904, 4611686018427387904, '2026-04-02 07:29:59.999999+05:30', '2026-04-02 07:29:59.999999+05:30', '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x previous_hash', '2026-04-02 07:29:59.999999+05:30');
INSERT INTO public.leases VALUES ('plain name', 'plain holder', -4611686018427387904, '2026-03-29 07:29:59.999999+05:30');
INSERT INTO public.leases VALUES ('B before a, as bytes name', 'B before a, as bytes holder', -2305843009213693952, '2026-03-30 07:29:59.999999+05:30');
INSERT INTO public.leases VALUES ('a name', 'a holder', 0, '2026-03-31 07:29:59.999999+05:30');
INSERT INTO public.leases VALUES ('ünïcode 😀 name', 'ünïcode 😀 holder', 2305843009213693952, '2026-04-01 07:29:59.999999+05:30');
INSERT INTO public.leases VALUES ('line
break ''quoted'' \ %s :x name', 'line
break ''quoted'' \ %s :x holder', 4611686018427387904, '2026-04-02 07:29:59.999999+05:30');
INSERT INTO public.requests VALUES (7, 'plain request_id', '2026-03-29 07:29:59.999999+05:30', 'plain model', NULL, NULL, 'plain route', NULL, -4611686018427387904, NULL, NULL, 0.1, NULL, NULL, NULL, NULL, NULL, -4611686018427387904, NULL, NULL, NULL, NULL, 'plain outcome', NULL, NULL, NULL);
INSERT INTO public.requests VALUES (14, 'B before a, as bytes request_id', '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes model', -2305843009213693952, 'B before a, as bytes format', 'B before a, as bytes route', 'B before a, as bytes key_id', -2305843009213693952, 'B before a, as bytes reason', 'B before a, as bytes finish_reason', 'Infinity', 'Infinity', -2305843009213693952, -2305843009213693952, 'B before a, as bytes prompt', 'B before a, as bytes answer', -2305843009213693952, 'Infinity', -2305843009213693952, 'Infinity', 'B before a, as bytes client_request_id', 'B before a, as bytes outcome', 'B before a, as bytes user_hash', 'B before a, as bytes unit', false);
INSERT INTO public.requests VALUES (21, 'a request_id', '2026-03-31 07:29:59.999999+05:30', 'a model', 0, 'a format', 'a route', 'a key_id', 0, 'a reason', 'a finish_reason', '-Infinity', '-Infinity', 0, 0, 'a prompt', 'a answer', 0, '-Infinity', 0, '-Infinity', 'a client_request_id', 'a outcome', 'a user_hash', 'a unit', true);
INSERT INTO public.requests VALUES (28, 'ünïcode 😀 request_id', '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 model', 2305843009213693952, 'ünïcode 😀 format', 'ünïcode 😀 route', 'ünïcode 😀 key_id', 2305843009213693952, 'ünïcode 😀 reason', 'ünïcode 😀 finish_reason', 5e-324, 5e-324, 2305843009213693952, 2305843009213693952, 'ünïcode 😀 prompt', 'ünïcode 😀 answer', 2305843009213693952, 5e-324, 2305843009213693952, 5e-324, 'ünïcode 😀 client_request_id', 'ünïcode 😀 outcome', 'ünïcode 😀 user_hash', 'ünïcode 😀 unit', false);
INSERT INTO public.requests VALUES (35, 'line
break ''quoted'' \ %s :x request_id', '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x model', 4611686018427387904, 'line
break ''quoted'' \ %s :x format', 'line
break ''quoted'' \ %s :x route', 'line
break ''quoted'' \ %s :x key_id', 4611686018427387904, 'line
break ''quoted'' \ %s :x reason', 'line
break ''quoted'' \ %s :x finish_reason', -1.7976931348623157e+308, -1.7976931348623157e+308, 4611686018427387904, 4611686018427387904, 'line
break ''quoted'' \ %s :x prompt', 'line
break ''quoted'' \ %s :x answer', 4611686018427387904, -1.7976931348623157e+308, 4611686018427387904, -1.7976931348623157e+308, 'line
break ''quoted'' \ %s :x client_request_id', 'line
break ''quoted'' \ %s :x outcome', 'line
break ''quoted'' \ %s :x user_hash', 'line
break ''quoted'' \ %s :x unit', true);
INSERT INTO public.retaken_probes VALUES ('plain name', -4611686018427387904, 'plain format', 'plain engine', 'plain probes');
INSERT INTO public.retaken_probes VALUES ('B before a, as bytes name', -2305843009213693952, 'B before a, as bytes format', 'B before a, as bytes engine', 'B before a, as bytes probes');
INSERT INTO public.retaken_probes VALUES ('a name', 0, 'a format', 'a engine', 'a probes');
INSERT INTO public.retaken_probes VALUES ('ünïcode 😀 name', 2305843009213693952, 'ünïcode 😀 format', 'ünïcode 😀 engine', 'ünïcode 😀 probes');
INSERT INTO public.retaken_probes VALUES ('line
break ''quoted'' \ %s :x name', 4611686018427387904, 'line
break ''quoted'' \ %s :x format', 'line
break ''quoted'' \ %s :x engine', 'line
break ''quoted'' \ %s :x probes');
INSERT INTO public.rollout_steps VALUES (7, 7, '2026-03-29 07:29:59.999999+05:30', 'plain text');
INSERT INTO public.rollout_steps VALUES (14, 14, '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes text');
INSERT INTO public.rollout_steps VALUES (21, 21, '2026-03-31 07:29:59.999999+05:30', 'a text');
INSERT INTO public.rollout_steps VALUES (28, 28, '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 text');
INSERT INTO public.rollout_steps VALUES (35, 35, '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x text');
INSERT INTO public.rollouts VALUES (7, 'plain name', -4611686018427387904, 'plain format', -4611686018427387904, 'plain previous_format', -4611686018427387904, 'plain plan', 'plain state', -4611686018427387904, '2026-03-29 07:29:59.999999+05:30', '2026-03-29 07:29:59.999999+05:30', 'plain actor', 'plain origin', NULL, NULL, NULL, NULL, NULL, NULL, 'plain signals', 'plain gates');
INSERT INTO public.rollouts VALUES (14, 'B before a, as bytes name', -2305843009213693952, 'B before a, as bytes format', -2305843009213693952, 'B before a, as bytes previous_format', -2305843009213693952, 'B before a, as bytes plan', 'B before a, as bytes state', -2305843009213693952, '2026-03-30 07:29:59.999999+05:30', '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes actor', 'B before a, as bytes origin', 'B before a, as bytes reason', 'B before a, as bytes forced', 'B before a, as bytes stop', '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes outcome', 'B before a, as bytes why', 'B before a, as bytes signals', 'B before a, as bytes gates');
INSERT INTO public.rollouts VALUES (21, 'a name', 0, 'a format', 0, 'a previous_format', 0, 'a plan', 'a state', 0, '2026-03-31 07:29:59.999999+05:30', '2026-03-31 07:29:59.999999+05:30', 'a actor', 'a origin', 'a reason', 'a forced', 'a stop', '2026-03-31 07:29:59.999999+05:30', 'a outcome', 'a why', 'a signals', 'a gates');
INSERT INTO public.rollouts VALUES (28, 'ünïcode 😀 name', 2305843009213693952, 'ünïcode 😀 format', 2305843009213693952, 'ünïcode 😀 previous_format', 2305843009213693952, 'ünïcode 😀 plan', 'ünïcode 😀 state', 2305843009213693952, '2026-04-01 07:29:59.999999+05:30', '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 actor', 'ünïcode 😀 origin', 'ünïcode 😀 reason', 'ünïcode 😀 forced', 'ünïcode 😀 stop', '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 outcome', 'ünïcode 😀 why', 'ünïcode 😀 signals', 'ünïcode 😀 gates');
INSERT INTO public.rollouts VALUES (35, 'line
break ''quoted'' \ %s :x name', 4611686018427387904, 'line
break ''quoted'' \ %s :x format', 4611686018427387904, 'line
break ''quoted'' \ %s :x previous_format', 4611686018427387904, 'line
break ''quoted'' \ %s :x plan', 'line
break ''quoted'' \ %s :x state', 4611686018427387904, '2026-04-02 07:29:59.999999+05:30', '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x actor', 'line
break ''quoted'' \ %s :x origin', 'line
break ''quoted'' \ %s :x reason', 'line
break ''quoted'' \ %s :x forced', 'line
break ''quoted'' \ %s :x stop', '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x outcome', 'line
break ''quoted'' \ %s :x why', 'line
break ''quoted'' \ %s :x signals', 'line
break ''quoted'' \ %s :x gates');
INSERT INTO public.served VALUES (7, 'plain server', 'plain name', -4611686018427387904, 'plain format', -4611686018427387904, '2026-03-29 07:29:59.999999+05:30', 'plain began_by', NULL, NULL);
INSERT INTO public.served VALUES (14, 'B before a, as bytes server', 'B before a, as bytes name', -2305843009213693952, 'B before a, as bytes format', -2305843009213693952, '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes began_by', '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes ended_by');
INSERT INTO public.served VALUES (21, 'a server', 'a name', 0, 'a format', 0, '2026-03-31 07:29:59.999999+05:30', 'a began_by', '2026-03-31 07:29:59.999999+05:30', 'a ended_by');
INSERT INTO public.served VALUES (28, 'ünïcode 😀 server', 'ünïcode 😀 name', 2305843009213693952, 'ünïcode 😀 format', 2305843009213693952, '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 began_by', '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 ended_by');
INSERT INTO public.served VALUES (35, 'line
break ''quoted'' \ %s :x server', 'line
break ''quoted'' \ %s :x name', 4611686018427387904, 'line
break ''quoted'' \ %s :x format', 4611686018427387904, '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x began_by', '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x ended_by');
INSERT INTO public.servers VALUES ('plain id', 'plain address', '2026-03-29 07:29:59.999999+05:30', '2026-03-29 07:29:59.999999+05:30');
INSERT INTO public.servers VALUES ('B before a, as bytes id', 'B before a, as bytes address', '2026-03-30 07:29:59.999999+05:30', '2026-03-30 07:29:59.999999+05:30');
INSERT INTO public.servers VALUES ('a id', 'a address', '2026-03-31 07:29:59.999999+05:30', '2026-03-31 07:29:59.999999+05:30');
INSERT INTO public.servers VALUES ('ünïcode 😀 id', 'ünïcode 😀 address', '2026-04-01 07:29:59.999999+05:30', '2026-04-01 07:29:59.999999+05:30');
INSERT INTO public.servers VALUES ('line
break ''quoted'' \ %s :x id', 'line
break ''quoted'' \ %s :x address', '2026-04-02 07:29:59.999999+05:30', '2026-04-02 07:29:59.999999+05:30');
INSERT INTO public.shadow_pairs VALUES (7, 7, '2026-03-29 07:29:59.999999+05:30', 'plain unit', true, true, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0.1, 0.1, NULL, NULL, NULL);
INSERT INTO public.shadow_pairs VALUES (14, 14, '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes unit', false, false, false, false, false, 'B before a, as bytes production_finish', 'B before a, as bytes candidate_finish', -2305843009213693952, -2305843009213693952, 'Infinity', 'Infinity', 'Infinity', 'Infinity', -2305843009213693952);
INSERT INTO public.shadow_pairs VALUES (21, 21, '2026-03-31 07:29:59.999999+05:30', 'a unit', true, true, true, true, true, 'a production_finish', 'a candidate_finish', 0, 0, '-Infinity', '-Infinity', '-Infinity', '-Infinity', 0);
INSERT INTO public.shadow_pairs VALUES (28, 28, '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 unit', false, false, false, false, false, 'ünïcode 😀 production_finish', 'ünïcode 😀 candidate_finish', 2305843009213693952, 2305843009213693952, 5e-324, 5e-324, 5e-324, 5e-324, 2305843009213693952);
INSERT INTO public.shadow_pairs VALUES (35, 35, '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x unit', true, true, true, true, true, 'line
break ''quoted'' \ %s :x production_finish', 'line
break ''quoted'' \ %s :x candidate_finish', 4611686018427387904, 4611686018427387904, -1.7976931348623157e+308, -1.7976931348623157e+308, -1.7976931348623157e+308, -1.7976931348623157e+308, 4611686018427387904);
INSERT INTO public.swap_steps VALUES (7, 7, '2026-03-29 07:29:59.999999+05:30', 'plain text');
INSERT INTO public.swap_steps VALUES (14, 14, '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes text');
INSERT INTO public.swap_steps VALUES (21, 21, '2026-03-31 07:29:59.999999+05:30', 'a text');
INSERT INTO public.swap_steps VALUES (28, 28, '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 text');
INSERT INTO public.swap_steps VALUES (35, 35, '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x text');
INSERT INTO public.swaps VALUES (7, 'plain server', 'plain name', -4611686018427387904, -4611686018427387904, 'plain format', '2026-03-29 07:29:59.999999+05:30', NULL, NULL, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.swaps VALUES (14, 'B before a, as bytes server', 'B before a, as bytes name', -2305843009213693952, -2305843009213693952, 'B before a, as bytes format', '2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes outcome', 'B before a, as bytes reason', 'Infinity', -2305843009213693952, -2305843009213693952, 'B before a, as bytes kind', 'Infinity');
INSERT INTO public.swaps VALUES (21, 'a server', 'a name', 0, 0, 'a format', '2026-03-31 07:29:59.999999+05:30', 'a outcome', 'a reason', '-Infinity', 0, 0, 'a kind', '-Infinity');
INSERT INTO public.swaps VALUES (28, 'ünïcode 😀 server', 'ünïcode 😀 name', 2305843009213693952, 2305843009213693952, 'ünïcode 😀 format', '2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 outcome', 'ünïcode 😀 reason', 5e-324, 2305843009213693952, 2305843009213693952, 'ünïcode 😀 kind', 5e-324);
INSERT INTO public.swaps VALUES (35, 'line
break ''quoted'' \ %s :x server', 'line
break ''quoted'' \ %s :x name', 4611686018427387904, 4611686018427387904, 'line
break ''quoted'' \ %s :x format', '2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x outcome', 'line
break ''quoted'' \ %s :x reason', -1.7976931348623157e+308, 4611686018427387904, 4611686018427387904, 'line
break ''quoted'' \ %s :x kind', -1.7976931348623157e+308);
INSERT INTO public.tuneserve_alembic_version VALUES ('servers');
INSERT INTO public.usage VALUES ('2026-03-29 07:29:59.999999+05:30', 'plain key_id', 'plain model', -4611686018427387904, -4611686018427387904, -4611686018427387904);
INSERT INTO public.usage VALUES ('2026-03-30 07:29:59.999999+05:30', 'B before a, as bytes key_id', 'B before a, as bytes model', -2305843009213693952, -2305843009213693952, -2305843009213693952);
INSERT INTO public.usage VALUES ('2026-03-31 07:29:59.999999+05:30', 'a key_id', 'a model', 0, 0, 0);
INSERT INTO public.usage VALUES ('2026-04-01 07:29:59.999999+05:30', 'ünïcode 😀 key_id', 'ünïcode 😀 model', 2305843009213693952, 2305843009213693952, 2305843009213693952);
INSERT INTO public.usage VALUES ('2026-04-02 07:29:59.999999+05:30', 'line
break ''quoted'' \ %s :x key_id', 'line
break ''quoted'' \ %s :x model', 4611686018427387904, 4611686018427387904, 4611686018427387904);
INSERT INTO public.webhook_deliveries VALUES (7, 'plain message', 'plain url', 'plain body', '2026-03-29 07:29:59.999999+05:30', -4611686018427387904, '2026-03-29 07:29:59.999999+05:30');
INSERT INTO public.webhook_deliveries VALUES (14, 'B before a, as bytes message', 'B before a, as bytes url', 'B before a, as bytes body', '2026-03-30 07:29:59.999999+05:30', -2305843009213693952, '2026-03-30 07:29:59.999999+05:30');
INSERT INTO public.webhook_deliveries VALUES (21, 'a message', 'a url', 'a body', '2026-03-31 07:29:59.999999+05:30', 0, '2026-03-31 07:29:59.999999+05:30');
INSERT INTO public.webhook_deliveries VALUES (28, 'ünïcode 😀 message', 'ünïcode 😀 url', 'ünïcode 😀 body', '2026-04-01 07:29:59.999999+05:30', 2305843009213693952, '2026-04-01 07:29:59.999999+05:30');
INSERT INTO public.webhook_deliveries VALUES (35, 'line
break ''quoted'' \ %s :x message', 'line
break ''quoted'' \ %s :x url', 'line
break ''quoted'' \ %s :x body', '2026-04-02 07:29:59.999999+05:30', 4611686018427387904, '2026-04-02 07:29:59.999999+05:30');
SELECT pg_catalog.setval('public.drift_alarms_id_seq', 1, false);
SELECT pg_catalog.setval('public.drift_items_id_seq', 1, false);
SELECT pg_catalog.setval('public.holdout_runs_id_seq', 1, false);
SELECT pg_catalog.setval('public.requests_id_seq', 1, false);
SELECT pg_catalog.setval('public.rollout_steps_id_seq', 1, false);
SELECT pg_catalog.setval('public.rollouts_id_seq', 1, false);
SELECT pg_catalog.setval('public.served_id_seq', 1, false);
SELECT pg_catalog.setval('public.shadow_pairs_id_seq', 1, false);
SELECT pg_catalog.setval('public.swap_steps_id_seq', 1, false);
SELECT pg_catalog.setval('public.swaps_id_seq', 1, false);
SELECT pg_catalog.setval('public.webhook_deliveries_id_seq', 1, false);
ALTER TABLE ONLY public.audit
    ADD CONSTRAINT pk_audit PRIMARY KEY (id);
ALTER TABLE ONLY public.deployments
    ADD CONSTRAINT pk_deployments PRIMARY KEY (name);
ALTER TABLE ONLY public.desired
    ADD CONSTRAINT pk_desired PRIMARY KEY (name);
ALTER TABLE ONLY public.drift_alarms
    ADD CONSTRAINT pk_drift_alarms PRIMARY KEY (id);
ALTER TABLE ONLY public.drift_baselines
    ADD CONSTRAINT pk_drift_baselines PRIMARY KEY (name, number, format);
ALTER TABLE ONLY public.drift_items
    ADD CONSTRAINT pk_drift_items PRIMARY KEY (id);
ALTER TABLE ONLY public.drift_states
    ADD CONSTRAINT pk_drift_states PRIMARY KEY (name, number, format, signal);
ALTER TABLE ONLY public.feedback
    ADD CONSTRAINT pk_feedback PRIMARY KEY (request);
ALTER TABLE ONLY public.holdout_runs
    ADD CONSTRAINT pk_holdout_runs PRIMARY KEY (id);
ALTER TABLE ONLY public.keys
    ADD CONSTRAINT pk_keys PRIMARY KEY (id);
ALTER TABLE ONLY public.leases
    ADD CONSTRAINT pk_leases PRIMARY KEY (name);
ALTER TABLE ONLY public.requests
    ADD CONSTRAINT pk_requests PRIMARY KEY (id);
ALTER TABLE ONLY public.retaken_probes
    ADD CONSTRAINT pk_retaken_probes PRIMARY KEY (name, number, format, engine);
ALTER TABLE ONLY public.rollout_steps
    ADD CONSTRAINT pk_rollout_steps PRIMARY KEY (id);
ALTER TABLE ONLY public.rollouts
    ADD CONSTRAINT pk_rollouts PRIMARY KEY (id);
ALTER TABLE ONLY public.served
    ADD CONSTRAINT pk_served PRIMARY KEY (id);
ALTER TABLE ONLY public.servers
    ADD CONSTRAINT pk_servers PRIMARY KEY (id);
ALTER TABLE ONLY public.shadow_pairs
    ADD CONSTRAINT pk_shadow_pairs PRIMARY KEY (id);
ALTER TABLE ONLY public.swap_steps
    ADD CONSTRAINT pk_swap_steps PRIMARY KEY (id);
ALTER TABLE ONLY public.swaps
    ADD CONSTRAINT pk_swaps PRIMARY KEY (id);
ALTER TABLE ONLY public.usage
    ADD CONSTRAINT pk_usage PRIMARY KEY (hour, key_id, model);
ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT pk_webhook_deliveries PRIMARY KEY (id);
ALTER TABLE ONLY public.tuneserve_alembic_version
    ADD CONSTRAINT tuneserve_alembic_version_pkc PRIMARY KEY (version_num);
CREATE UNIQUE INDEX ix_drift_items_request ON public.drift_items USING btree (request);
CREATE INDEX ix_drift_items_target ON public.drift_items USING btree (name, number, format);
CREATE INDEX ix_keys_revision ON public.keys USING btree (revision);
CREATE INDEX ix_requests_request_id ON public.requests USING btree (request_id);
CREATE INDEX ix_requests_started_at ON public.requests USING btree (started_at);
CREATE INDEX ix_rollout_steps_rollout_id ON public.rollout_steps USING btree (rollout_id);
CREATE INDEX ix_rollouts_name ON public.rollouts USING btree (name);
CREATE INDEX ix_served_name ON public.served USING btree (name);
CREATE INDEX ix_shadow_pairs_rollout_id ON public.shadow_pairs USING btree (rollout_id);
CREATE INDEX ix_swap_steps_swap_id ON public.swap_steps USING btree (swap_id);
CREATE TRIGGER audit_no_delete BEFORE DELETE ON public.audit FOR EACH ROW EXECUTE FUNCTION public.refuse_audit_change();
CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON public.audit FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_audit_change();
CREATE TRIGGER audit_no_update BEFORE UPDATE ON public.audit FOR EACH ROW EXECUTE FUNCTION public.refuse_audit_change();
ALTER TABLE ONLY public.drift_items
    ADD CONSTRAINT fk_drift_items_request FOREIGN KEY (request) REFERENCES public.requests(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.feedback
    ADD CONSTRAINT fk_feedback_request FOREIGN KEY (request) REFERENCES public.requests(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.rollout_steps
    ADD CONSTRAINT fk_rollout_steps_rollout_id FOREIGN KEY (rollout_id) REFERENCES public.rollouts(id);
ALTER TABLE ONLY public.shadow_pairs
    ADD CONSTRAINT fk_shadow_pairs_rollout_id FOREIGN KEY (rollout_id) REFERENCES public.rollouts(id);
ALTER TABLE ONLY public.swap_steps
    ADD CONSTRAINT fk_swap_steps_swap_id FOREIGN KEY (swap_id) REFERENCES public.swaps(id);
