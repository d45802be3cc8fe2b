-- Models in tables. Owners and privileges are those of a domain per model in schema tessera_model, so that GRANT, DROP
-- ROLE, REASSIGN OWNED and pg_dump treat a model as they treat PostgreSQL's own objects.
CREATE SCHEMA tessera;
COMMENT ON SCHEMA tessera IS 'tables and views of pg_tessera';
CREATE SCHEMA tessera_model;
COMMENT ON SCHEMA tessera_model IS 'one domain per loaded model: its owner owns the model, its USAGE privilege is the right to predict';
GRANT USAGE ON SCHEMA tessera, tessera_model TO PUBLIC;

CREATE SEQUENCE tessera.model_id_seq;
COMMENT ON SEQUENCE tessera.model_id_seq IS 'ids of tessera.model; never reused';
CREATE TABLE tessera.model (
    id bigint NOT NULL DEFAULT pg_catalog.nextval('tessera.model_id_seq'),
    name text COLLATE "C" NOT NULL,
    active_version integer,
    last_version integer NOT NULL DEFAULT 0,
    domain regtype NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT model_pkey PRIMARY KEY (id),
    CONSTRAINT model_name_key UNIQUE (name)
);
COMMENT ON TABLE tessera.model IS 'models by name';

CREATE TABLE tessera.graph (
    hash bytea NOT NULL,
    graph bytea NOT NULL,
    CONSTRAINT graph_pkey PRIMARY KEY (hash)
);
COMMENT ON TABLE tessera.graph IS 'ONNX graphs without their tensors, each stored once';

CREATE SEQUENCE tessera.model_version_id_seq;
COMMENT ON SEQUENCE tessera.model_version_id_seq IS 'ids of tessera.model_version; never reused';
CREATE TABLE tessera.model_version (
    id bigint NOT NULL DEFAULT pg_catalog.nextval('tessera.model_version_id_seq'),
    model bigint NOT NULL,
    version integer NOT NULL,
    content_hash bytea NOT NULL,
    graph_hash bytea NOT NULL,
    signature jsonb NOT NULL,
    parameters bigint NOT NULL,
    loaded_bytes bigint NOT NULL,
    block_bytes integer NOT NULL,
    loaded_at timestamptz NOT NULL DEFAULT now(),
    rows_declared boolean,
    CONSTRAINT model_version_pkey PRIMARY KEY (id),
    CONSTRAINT model_version_key UNIQUE (model, version)
);
CREATE INDEX model_version_content ON tessera.model_version (content_hash);
COMMENT ON INDEX tessera.model_version_content IS 'finds a version with the same content, whose tensors need not be stored again';
COMMENT ON TABLE tessera.model_version IS 'versions of models';

CREATE SEQUENCE tessera.tensor_id_seq;
COMMENT ON SEQUENCE tessera.tensor_id_seq IS 'ids of tessera.tensor; never reused';
CREATE TABLE tessera.tensor (
    id bigint NOT NULL DEFAULT pg_catalog.nextval('tessera.tensor_id_seq'),
    model_version bigint NOT NULL,
    ordinal integer NOT NULL,
    name text NOT NULL,
    dtype text NOT NULL,
    dims bigint[] NOT NULL,
    view text NOT NULL,
    block_bytes integer NOT NULL,
    CONSTRAINT tensor_pkey PRIMARY KEY (id),
    CONSTRAINT tensor_key UNIQUE (model_version, ordinal)
);
COMMENT ON TABLE tessera.tensor IS 'tensors of model versions, in the order in which the graph names them';

CREATE TABLE tessera.weight (
    tensor bigint NOT NULL,
    block_row integer NOT NULL,
    block_col integer NOT NULL,
    data @extschema@.tensor_block NOT NULL,
    CONSTRAINT weight_pkey PRIMARY KEY (tensor, block_row, block_col)
) USING tensor_block;
COMMENT ON TABLE tessera.weight IS 'tensor blocks of all models; equal blocks are stored once';

-- What pg_dump takes along.
SELECT pg_catalog.pg_extension_config_dump('tessera.model', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.graph', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.model_version', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.tensor', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.weight', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.model_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.model_version_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.tensor_id_seq', '');

REVOKE ALL ON ALL SEQUENCES IN SCHEMA tessera FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA tessera FROM PUBLIC;

CREATE FUNCTION tessera.on_sql_drop() RETURNS event_trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'tessera_on_sql_drop';
COMMENT ON FUNCTION tessera.on_sql_drop() IS 'removes the models whose domains were dropped';
CREATE EVENT TRIGGER tessera_sql_drop ON sql_drop EXECUTE FUNCTION tessera.on_sql_drop();
COMMENT ON EVENT TRIGGER tessera_sql_drop IS 'removes the models whose domains were dropped';
