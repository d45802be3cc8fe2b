-- The block cache: what is in it, and what shall stay. Views show a role only frames of this database, and of models that it
-- may predict with.
CREATE FUNCTION tessera.cache_frames(OUT frame integer, OUT bytes integer, OUT pins integer, OUT state text, OUT models text[])
    RETURNS SETOF record LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_cache_frames';
COMMENT ON FUNCTION tessera.cache_frames() IS 'frames of the block cache that hold blocks of models of this database; read tessera.block_cache';
CREATE VIEW tessera.block_cache AS SELECT frame, bytes, pins, state, models FROM tessera.cache_frames();
COMMENT ON VIEW tessera.block_cache IS 'frames of the block cache that hold blocks of models of this database: bytes of the block, how often it is pinned, and the models that used it, as name@version';

CREATE FUNCTION tessera.cache_totals(OUT shared boolean, OUT frames bigint, OUT frames_used bigint, OUT frames_pinned bigint,
    OUT bytes bigint, OUT bytes_used bigint, OUT hits bigint, OUT misses bigint, OUT loads bigint, OUT bytes_loaded bigint,
    OUT evictions bigint, OUT waits bigint, OUT fallbacks bigint, OUT stats_reset timestamptz)
    RETURNS record LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_cache_totals';
COMMENT ON FUNCTION tessera.cache_totals() IS 'counts of the whole block cache; read tessera.block_cache_stats';
CREATE VIEW tessera.block_cache_stats AS
    SELECT shared, frames, frames_used, frames_pinned, bytes, bytes_used, hits, misses,
           CASE WHEN hits + misses > 0 THEN round(hits::numeric / (hits + misses), 4) END AS hit_ratio,
           loads, bytes_loaded, evictions, waits, fallbacks, stats_reset
    FROM tessera.cache_totals();
COMMENT ON VIEW tessera.block_cache_stats IS 'one row about the block cache: whether all sessions share it, its size, and since stats_reset the blocks that were found and missed, loaded into frames, evicted, waited for while another session loaded them, and read into private memory';

CREATE FUNCTION tessera.cache_models(OUT models text[], OUT kept boolean, OUT runs bigint, OUT frames bigint, OUT bytes bigint,
    OUT hits bigint, OUT misses bigint, OUT loads bigint, OUT bytes_loaded bigint, OUT waits bigint, OUT fallbacks bigint)
    RETURNS SETOF record LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_cache_models';
COMMENT ON FUNCTION tessera.cache_models() IS 'models of this database that used the block cache; read tessera.block_cache_models';
CREATE VIEW tessera.block_cache_models AS
    SELECT models, kept, runs, frames, bytes, hits, misses,
           CASE WHEN hits + misses > 0 THEN round(hits::numeric / (hits + misses), 4) END AS hit_ratio,
           loads, bytes_loaded, waits, fallbacks
    FROM tessera.cache_models();
COMMENT ON VIEW tessera.block_cache_models IS 'tessera.block_cache_stats by model; versions with equal content are one. Up to 63 models that are in use have a row, shared frames count for each';
GRANT SELECT ON tessera.block_cache, tessera.block_cache_stats, tessera.block_cache_models TO PUBLIC;

CREATE FUNCTION tessera.prediction_counts(OUT models text[], OUT calls bigint, OUT rows bigint, OUT batches bigint,
    OUT time_ms double precision, OUT errors bigint)
    RETURNS SETOF record LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_prediction_counts';
COMMENT ON FUNCTION tessera.prediction_counts() IS 'predictions with the models of this database; read tessera.model_stats';
CREATE VIEW tessera.model_stats AS
    SELECT pg_catalog.split_part(n.name, '@', 1) AS model, nullif(pg_catalog.split_part(n.name, '@', 2), '')::integer AS version,
           p.calls, p.rows, p.batches, p.time_ms, p.errors, c.hits AS cache_hits, c.misses AS cache_misses
    FROM tessera.prediction_counts() p CROSS JOIN LATERAL pg_catalog.unnest(p.models) AS n(name)
    LEFT JOIN tessera.block_cache_models c ON n.name = ANY (c.models);
COMMENT ON VIEW tessera.model_stats IS 'predictions by model and version since the server started, or since reset_model_stats(); versions with equal content are counted together';
GRANT SELECT ON tessera.model_stats TO PUBLIC;
CREATE FUNCTION reset_model_stats() RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_reset_model_stats';
COMMENT ON FUNCTION reset_model_stats() IS 'sets the counts of tessera.model_stats to zero';
REVOKE ALL ON FUNCTION reset_model_stats() FROM PUBLIC;

CREATE FUNCTION tessera.activities(OUT pid integer, OUT command text, OUT phase text, OUT models text[], OUT rows bigint,
    OUT blocks_done bigint, OUT blocks_total bigint)
    RETURNS SETOF record LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_activities';
COMMENT ON FUNCTION tessera.activities() IS 'loads, predictions and deduplications under way in this database; read tessera.progress';
CREATE VIEW tessera.progress AS
    SELECT pid, command, phase, models, NULL::regclass AS relation, rows, blocks_done, blocks_total FROM tessera.activities()
    UNION ALL
    SELECT p.pid, 'repack', p.phase, NULL, c.oid, NULL, p.heap_blks_scanned, p.heap_blks_total
    FROM pg_catalog.pg_stat_progress_cluster p
    JOIN pg_catalog.pg_class c ON c.oid = p.relid
    JOIN pg_catalog.pg_am a ON a.oid = c.relam AND a.amname = 'tensor_block'
    WHERE p.datname = pg_catalog.current_database();
COMMENT ON VIEW tessera.progress IS 'loads, predictions, deduplications and repacks under way in this database: rows predicted so far, and blocks that were stored, read in the current run of the model, compared, merged for a trial, or moved, of how many';
GRANT SELECT ON tessera.progress TO PUBLIC;

CREATE FUNCTION tessera.check_cache(OUT problem text, OUT frame integer, OUT detail text) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_check_cache';
COMMENT ON FUNCTION tessera.check_cache() IS 'a row for each broken invariant of the block cache; none when it is sound. Stops all use of the cache for a moment';
CREATE FUNCTION reset_cache_stats() RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_reset_cache_stats';
COMMENT ON FUNCTION reset_cache_stats() IS 'sets the counts of tessera.block_cache_stats and tessera.block_cache_models to zero';
REVOKE ALL ON FUNCTION tessera.check_cache(), reset_cache_stats() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION tessera.check_cache() TO pg_monitor;

CREATE FUNCTION keep_model(name text) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_keep_model';
COMMENT ON FUNCTION keep_model(text) IS 'marks a version of a model: its blocks leave the block cache last, as long as they fit in half of it. The mark lasts until release_model or a restart of the server';
CREATE FUNCTION release_model(name text) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_release_model';
COMMENT ON FUNCTION release_model(text) IS 'takes the mark of keep_model away; false if there was none';
CREATE FUNCTION warm_model(name text) RETURNS bigint
    LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'tessera_warm_model';
COMMENT ON FUNCTION warm_model(text) IS 'loads the blocks of a version of a model into the block cache; returns how many were found or put there. In a cache that is smaller than the model, later blocks replace earlier ones';
