-- Inspection. Views show a role only the models that it may predict with, and only the tables that it may read.
CREATE FUNCTION tessera.block_id(@extschema@.tensor_block) RETURNS bigint LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_id';
COMMENT ON FUNCTION tessera.block_id(@extschema@.tensor_block) IS 'number of the value''s block in its table''s block store; null for a value that lies in the row';
CREATE FUNCTION tessera.block_id(bytea) RETURNS bigint LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_id';
COMMENT ON FUNCTION tessera.block_id(bytea) IS 'number of the value''s block in its table''s block store; null for a value that lies in the row';
CREATE FUNCTION tessera.block_id(text) RETURNS bigint LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_id';
COMMENT ON FUNCTION tessera.block_id(text) IS 'number of the value''s block in its table''s block store; null for a value that lies in the row';

CREATE FUNCTION tessera.stored_bytes(@extschema@.tensor_block) RETURNS bigint LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_stored_bytes';
COMMENT ON FUNCTION tessera.stored_bytes(@extschema@.tensor_block) IS 'bytes that the value takes where it lies: in its table''s block store, in the form in which it is stored there, or in the row';

CREATE FUNCTION tessera.store_totals(relation regclass, OUT blocks_referenced bigint, OUT bytes_referenced bigint,
    OUT blocks_stored bigint, OUT bytes_stored bigint, OUT store_bytes bigint, OUT block_ids_left bigint)
    RETURNS record LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_store_totals';
COMMENT ON FUNCTION tessera.store_totals(regclass) IS 'counts of a tensor_block table and its block store';

CREATE VIEW tessera.storage AS
    SELECT c.oid::regclass AS relation, t.blocks_referenced, t.bytes_referenced, t.blocks_stored, t.bytes_stored,
           t.store_bytes,
           CASE WHEN t.bytes_stored > 0 THEN round(t.bytes_referenced::numeric / t.bytes_stored, 3) END AS deduplication_ratio,
           t.block_ids_left
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_am a ON a.oid = c.relam AND a.amname = 'tensor_block'
    CROSS JOIN LATERAL tessera.store_totals(c.oid::regclass) t
    WHERE c.relkind IN ('r', 'm') AND c.reltoastrelid <> 0
      AND (c.oid = 'tessera.weight'::regclass OR pg_catalog.has_table_privilege(c.oid, 'SELECT'));
COMMENT ON VIEW tessera.storage IS 'per tensor_block table: references to blocks, blocks stored, and their ratio';

CREATE VIEW tessera.models AS
    WITH references_ AS MATERIALIZED (
        SELECT t.model_version, tessera.block_id(w.data) AS block, tessera.stored_bytes(w.data) AS bytes
        FROM tessera.weight w JOIN tessera.tensor t ON t.id = w.tensor
    ), blocks AS (
        SELECT model_version, block, min(bytes) AS bytes FROM references_ WHERE block IS NOT NULL GROUP BY 1, 2
    ), sharing AS (
        SELECT model_version, bytes, count(*) OVER (PARTITION BY block) AS versions FROM blocks
    ), sizes AS (
        SELECT model_version, sum(bytes)::bigint AS stored, coalesce(sum(bytes) FILTER (WHERE versions > 1), 0)::bigint AS shared
        FROM sharing GROUP BY 1
    )
    SELECT m.name, v.version, v.version = m.active_version AS active, pg_catalog.pg_get_userbyid(d.typowner) AS owner,
           v.loaded_at, v.parameters, v.loaded_bytes AS bytes_loaded, coalesce(s.stored, 0) AS bytes_stored,
           coalesce(s.shared, 0) AS bytes_shared, v.block_bytes,
           v.signature ->> 'producer' AS producer, (v.signature ->> 'ir_version')::bigint AS ir_version,
           v.signature -> 'opsets' AS opsets, m.domain,
           coalesce(v.rows_declared, v.signature -> 'rows' ->> 'verdict' = 'independent') AS rows_independent,
           CASE WHEN v.rows_declared IS NOT NULL THEN 'declared' ELSE coalesce(v.signature -> 'rows' ->> 'reason', 'proven') END AS rows_reason,
           (v.signature -> 'rows' -> 'inputs' ->> 0)::integer AS row_axis, (v.signature ->> 'flops_per_row')::double precision AS flops_per_row
    FROM tessera.model m
    JOIN tessera.model_version v ON v.model = m.id
    JOIN pg_catalog.pg_type d ON d.oid = m.domain
    LEFT JOIN sizes s ON s.model_version = v.id
    WHERE pg_catalog.has_type_privilege(m.domain, 'USAGE');
COMMENT ON VIEW tessera.models IS 'loaded models, one row per version';

CREATE VIEW tessera.model_inputs AS
    SELECT m.name AS model, v.version, p.ordinality AS position, p.port ->> 'name' AS name, p.port ->> 'dtype' AS dtype, ARRAY(SELECT coalesce(d.dim ->> 'fixed', d.dim ->> 'symbol', '?')
                 FROM pg_catalog.jsonb_array_elements(p.port -> 'shape') WITH ORDINALITY d(dim, n) ORDER BY d.n) AS shape
    FROM tessera.model m JOIN tessera.model_version v ON v.model = m.id
    CROSS JOIN LATERAL pg_catalog.jsonb_array_elements(v.signature -> 'inputs') WITH ORDINALITY p(port, ordinality)
    WHERE pg_catalog.has_type_privilege(m.domain, 'USAGE');
COMMENT ON VIEW tessera.model_inputs IS 'inputs of models: name, element type, and shape: sizes, names of free dimensions, ? for unnamed ones';

CREATE VIEW tessera.model_outputs AS
    SELECT m.name AS model, v.version, p.ordinality AS position, p.port ->> 'name' AS name, p.port ->> 'dtype' AS dtype, ARRAY(SELECT coalesce(d.dim ->> 'fixed', d.dim ->> 'symbol', '?')
                 FROM pg_catalog.jsonb_array_elements(p.port -> 'shape') WITH ORDINALITY d(dim, n) ORDER BY d.n) AS shape
    FROM tessera.model m JOIN tessera.model_version v ON v.model = m.id
    CROSS JOIN LATERAL pg_catalog.jsonb_array_elements(v.signature -> 'outputs') WITH ORDINALITY p(port, ordinality)
    WHERE pg_catalog.has_type_privilege(m.domain, 'USAGE');
COMMENT ON VIEW tessera.model_outputs IS 'outputs of models: name, element type, and shape: sizes, names of free dimensions, ? for unnamed ones';

CREATE VIEW tessera.tensors AS
    WITH references_ AS MATERIALIZED (
        SELECT tensor, tessera.block_id(data) AS block, tessera.stored_bytes(data) AS bytes FROM tessera.weight
    ), sharing AS (
        SELECT tensor, bytes, block, min(tensor) OVER (PARTITION BY block) <> max(tensor) OVER (PARTITION BY block) AS shared
        FROM references_
    ), counts AS (
        SELECT tensor, count(*) AS blocks, count(*) FILTER (WHERE block IS NOT NULL AND shared) AS shared_blocks, sum(bytes)::bigint AS bytes
        FROM sharing GROUP BY 1
    )
    SELECT m.name AS model, v.version, t.ordinal, t.name, t.dtype, t.dims, t.view, coalesce(c.blocks, 0) AS blocks,
           coalesce(c.shared_blocks, 0) AS shared_blocks, coalesce(c.bytes, 0) AS bytes
    FROM tessera.model m JOIN tessera.model_version v ON v.model = m.id JOIN tessera.tensor t ON t.model_version = v.id
    LEFT JOIN counts c ON c.tensor = t.id
    WHERE pg_catalog.has_type_privilege(m.domain, 'USAGE');
COMMENT ON VIEW tessera.tensors IS 'tensors of models, with the blocks that they are made of and how many of those other tensors share';

GRANT SELECT ON tessera.storage, tessera.models, tessera.model_inputs, tessera.model_outputs, tessera.tensors TO PUBLIC;
