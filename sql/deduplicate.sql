-- Near duplicates. Options that are NULL have the defaults that the comment names.
CREATE FUNCTION deduplicate_model(name text, validation text, metric text DEFAULT 'accuracy', max_drop double precision DEFAULT 0.01,
    tolerance double precision DEFAULT NULL, share double precision DEFAULT NULL, radius double precision DEFAULT NULL, span text DEFAULT NULL,
    bands integer DEFAULT NULL, hashes_per_band integer DEFAULT NULL, importance text DEFAULT NULL, step integer DEFAULT NULL,
    holdout double precision DEFAULT 0.5, seed bigint DEFAULT 0, dry_run boolean DEFAULT false,
    OUT version integer, OUT blocks bigint, OUT blocks_skipped bigint, OUT blocks_shared bigint, OUT candidates bigint,
    OUT tried bigint, OUT merged bigint, OUT evaluations bigint, OUT metric_before double precision,
    OUT metric_after double precision, OUT guide_before double precision, OUT guide_after double precision,
    OUT bytes_saved bigint, OUT note text, OUT seconds jsonb)
    RETURNS record LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_deduplicate_model';
COMMENT ON FUNCTION deduplicate_model(text, text, text, double precision, double precision, double precision, double precision, text,
    integer, integer, text, integer, double precision, bigint, boolean) IS
    'stores a version of a model in which blocks are replaced by near duplicates that models have already, as long as the metric on the rows of the validation query drops by max_drop at most; the new version becomes the active one, the old one stays';
