-- Maintenance of block stores, and a look at their pages.
CREATE FUNCTION check_store(relation regclass, OUT problem text, OUT block_id bigint, OUT detail text) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_check_store';
COMMENT ON FUNCTION check_store(regclass) IS 'a row for each broken invariant of a tensor_block table and its block store; none when it is sound';
CREATE FUNCTION repack(relation regclass, tensor_column name DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_repack';
COMMENT ON FUNCTION repack(regclass, name) IS 'moves the blocks of a tensor_block table so that those of a tensor lie together; returns how many moves there were';

CREATE FUNCTION tessera.store_meta(relation regclass, OUT version bigint, OUT next_block_id bigint, OUT block_ids_left bigint,
    OUT tensor_pages bigint, OUT blocks bigint, OUT bytes bigint, OUT pages bigint, OUT gap_page bigint) RETURNS SETOF record
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_store_meta';
COMMENT ON FUNCTION tessera.store_meta(regclass) IS 'the metapage of a tensor_block table''s block store';
CREATE FUNCTION tessera.store_blocks(relation regclass, OUT block_id bigint, OUT state text, OUT hash bytea, OUT tensor_page bigint,
    OUT page bigint, OUT page_offset bigint, OUT stored_bytes bigint, OUT raw_bytes bigint, OUT compression text,
    OUT version bigint, OUT condemned_by xid8) RETURNS SETOF record
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_store_blocks';
COMMENT ON FUNCTION tessera.store_blocks(regclass) IS 'the locators of a tensor_block table''s block store: which blocks there are, and where they lie';
CREATE FUNCTION tessera.store_page(relation regclass, page bigint, OUT kind text, OUT tensor_page bigint, OUT entries bigint,
    OUT lsn pg_lsn) RETURNS SETOF record
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_store_page';
COMMENT ON FUNCTION tessera.store_page(regclass, bigint) IS 'what a page of a tensor_block table''s block store is';
REVOKE ALL ON FUNCTION tessera.store_meta(regclass), tessera.store_blocks(regclass), tessera.store_page(regclass, bigint) FROM PUBLIC;
