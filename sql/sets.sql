-- Sets of models of one architecture. A set has an owner and privileges by a domain, as a model has, in the same schema: so a
-- set and a model cannot have the same name.
CREATE SEQUENCE tessera.architecture_id_seq;
COMMENT ON SEQUENCE tessera.architecture_id_seq IS 'ids of tessera.architecture; never reused';
CREATE TABLE tessera.architecture (
    id bigint NOT NULL DEFAULT pg_catalog.nextval('tessera.architecture_id_seq'),
    graph_hash bytea NOT NULL,
    signature jsonb NOT NULL,
    CONSTRAINT architecture_pkey PRIMARY KEY (id),
    CONSTRAINT architecture_graph_key UNIQUE (graph_hash)
);
COMMENT ON TABLE tessera.architecture IS 'graphs that sets of models have in common';

CREATE SEQUENCE tessera.model_set_id_seq;
COMMENT ON SEQUENCE tessera.model_set_id_seq IS 'ids of tessera.model_set; never reused';
CREATE TABLE tessera.model_set (
    id bigint NOT NULL DEFAULT pg_catalog.nextval('tessera.model_set_id_seq'),
    name text COLLATE "C" NOT NULL,
    domain regtype NOT NULL,
    architecture bigint NOT NULL,
    storage text NOT NULL,
    based_on bigint,
    members bigint NOT NULL,
    bytes_added bigint NOT NULL,
    training jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT model_set_pkey PRIMARY KEY (id),
    CONSTRAINT model_set_name_key UNIQUE (name)
);
COMMENT ON TABLE tessera.model_set IS 'sets of models by name';

CREATE TABLE tessera.set_map (
    model_set bigint NOT NULL,
    chunk integer NOT NULL,
    first_name text COLLATE "C" NOT NULL,
    names bytea NOT NULL,
    places bytea NOT NULL,
    recipes bytea NOT NULL,
    CONSTRAINT set_map_pkey PRIMARY KEY (model_set, chunk)
) USING tensor_block;
COMMENT ON TABLE tessera.set_map IS 'names of a set''s members, 512 a row, and where their segments lie, with checksums; equal parts of several sets are stored once';

CREATE SEQUENCE tessera.set_block_number_seq MAXVALUE 4294967294;
COMMENT ON SEQUENCE tessera.set_block_number_seq IS 'numbers of tessera.set_block; never reused';
CREATE TABLE tessera.set_block (
    number bigint NOT NULL,
    architecture bigint NOT NULL,
    segments bytea NOT NULL,
    data @extschema@.tensor_block NOT NULL,
    CONSTRAINT set_block_pkey PRIMARY KEY (number)
) USING tensor_block;
CREATE INDEX set_block_architecture ON tessera.set_block (architecture);
COMMENT ON INDEX tessera.set_block_architecture IS 'finds the blocks that no set uses any more';
COMMENT ON TABLE tessera.set_block IS 'segments of the members of sets, packed into blocks: offset and hash of each, and their bytes';

SELECT pg_catalog.pg_extension_config_dump('tessera.architecture', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.model_set', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.set_map', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.set_block', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.architecture_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.model_set_id_seq', '');
SELECT pg_catalog.pg_extension_config_dump('tessera.set_block_number_seq', '');

REVOKE ALL ON tessera.architecture, tessera.model_set, tessera.set_map, tessera.set_block FROM PUBLIC;
REVOKE ALL ON SEQUENCE tessera.architecture_id_seq, tessera.model_set_id_seq, tessera.set_block_number_seq FROM PUBLIC;

CREATE FUNCTION save_model_set(set_name text, members text, based_on text DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_save_model_set';
COMMENT ON FUNCTION save_model_set(text, text, text) IS 'saves the models that a query gives (name text, model bytea), all of one architecture, as a set; based on another set only what differs from it is stored, and members that the query does not give are taken over. Returns the number of members';
CREATE FUNCTION load_model_set(set_name text, architecture bytea, parameters text, based_on text DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_load_model_set';
COMMENT ON FUNCTION load_model_set(text, bytea, text, text) IS 'as save_model_set, for parameters alone: the ONNX model of one member, and a query that gives (name text, parameters real[] or bytea), all tensors one behind the other in the order of that model';
CREATE FUNCTION train_model_set(set_name text, based_on text, training text, data text, params jsonb DEFAULT '{}', members text[] DEFAULT NULL, verify boolean DEFAULT true) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_train_model_set';
COMMENT ON FUNCTION train_model_set(text, text, text, text, jsonb, text[], boolean) IS 'saves a set by how it is made: members of another set (all if none are named) are trained by a function (onnx bytea, data text, params jsonb) returns bytea on the rows of a query, in which $1 is the member''s name. Nothing of the result is stored but its hash; verify: each is trained twice to see that it comes out the same. Returns how many were trained';
CREATE FUNCTION recover_model(member text) RETURNS bytea
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_recover_model';
COMMENT ON FUNCTION recover_model(text) IS 'a member of a set, named set/member, as an ONNX file';
CREATE FUNCTION recover_model_set(set_name text, OUT name text, OUT model bytea) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE ROWS 1000 AS 'MODULE_PATHNAME', 'tessera_recover_model_set';
COMMENT ON FUNCTION recover_model_set(text) IS 'all members of a set as ONNX files, with their names';
CREATE FUNCTION drop_model_set(set_name text) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_drop_model_set';
COMMENT ON FUNCTION drop_model_set(text) IS 'drops a set; sets that are based on it keep what they need, unless they are trained from it: then it stays';
CREATE FUNCTION recommend_storage(set_name text, OUT storage text, OUT bytes bigint, OUT save_ms double precision, OUT recover_ms double precision, OUT recommended boolean) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE ROWS 3 AS 'MODULE_PATHNAME', 'tessera_recommend_storage';
COMMENT ON FUNCTION recommend_storage(text) IS 'what a set costs saved whole, by its differences, and by its training: bytes, and milliseconds to save and to recover it, estimated from a sample of its members';
CREATE FUNCTION train_feed_forward(onnx bytea, data text, params jsonb) RETURNS bytea
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_train_feed_forward';
COMMENT ON FUNCTION train_feed_forward(bytea, text, jsonb) IS 'trains a small feed-forward network by stochastic gradient descent, on a query''s rows (input, target), both arrays of numbers; params: epochs, learning_rate, batch, momentum, weight_decay, seed, loss (mse, cross_entropy, binary_cross_entropy), layers';

CREATE FUNCTION tessera.set_member_names(model_set bigint, OUT name text, OUT place bigint) RETURNS SETOF record
    LANGUAGE c STABLE STRICT PARALLEL RESTRICTED ROWS 1000 AS 'MODULE_PATHNAME', 'tessera_set_member_names';
COMMENT ON FUNCTION tessera.set_member_names(bigint) IS 'names of a set''s members and their places in its map, for roles that may use the set; read tessera.model_set_members';

CREATE VIEW tessera.model_sets AS
    SELECT s.name, pg_catalog.pg_get_userbyid(d.typowner) AS owner, s.storage, p.name AS based_on, s.members,
           (a.signature ->> 'parameters')::bigint AS parameters, (a.signature ->> 'parameter_bytes')::bigint AS parameter_bytes,
           s.bytes_added, s.training, s.created_at, s.domain
    FROM tessera.model_set s JOIN tessera.architecture a ON a.id = s.architecture
    JOIN pg_catalog.pg_type d ON d.oid = s.domain
    LEFT JOIN tessera.model_set p ON p.id = s.based_on AND pg_catalog.has_type_privilege(p.domain, 'USAGE')
    WHERE pg_catalog.has_type_privilege(s.domain, 'USAGE');
COMMENT ON VIEW tessera.model_sets IS 'sets of models: how they are stored, how many members they have, parameters and their bytes of each, and the bytes that saving the set added';
CREATE VIEW tessera.model_set_members AS
    SELECT s.name AS model_set, m.name AS member
    FROM tessera.model_set s CROSS JOIN LATERAL tessera.set_member_names(s.id) m
    WHERE pg_catalog.has_type_privilege(s.domain, 'USAGE');
COMMENT ON VIEW tessera.model_set_members IS 'members of sets; predict and recover_model take them as set/member';
GRANT SELECT ON tessera.model_sets, tessera.model_set_members TO PUBLIC;
