-- Life cycle of models.
CREATE FUNCTION load_model(name text, onnx bytea, block_bytes integer DEFAULT 65536) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_load_model';
COMMENT ON FUNCTION load_model(text, bytea, integer) IS 'stores an ONNX model and returns the new version, which becomes the active one';
CREATE FUNCTION load_model_from_file(name text, path text, block_bytes integer DEFAULT 65536) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_load_model_from_file';
COMMENT ON FUNCTION load_model_from_file(text, text, integer) IS 'as load_model, from a file of the server and the external data files beside it';
CREATE FUNCTION load_model_from_large_object(name text, large_object oid, block_bytes integer DEFAULT 65536) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_load_model_from_large_object';
COMMENT ON FUNCTION load_model_from_large_object(text, oid, integer) IS 'as load_model, from a large object, which may be larger than a bytea';
CREATE FUNCTION export_model(name text, version integer DEFAULT NULL) RETURNS bytea
    LANGUAGE c STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_export_model';
COMMENT ON FUNCTION export_model(text, integer) IS 'the model as an ONNX file';
CREATE FUNCTION export_model_to_large_object(name text, version integer DEFAULT NULL) RETURNS oid
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_export_model_to_large_object';
COMMENT ON FUNCTION export_model_to_large_object(text, integer) IS 'the model as an ONNX file in a new large object';
CREATE FUNCTION activate_model(name text, version integer) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_activate_model';
COMMENT ON FUNCTION activate_model(text, integer) IS 'makes a version the one that predict uses';
CREATE FUNCTION rename_model(name text, new_name text) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_rename_model';
COMMENT ON FUNCTION rename_model(text, text) IS 'gives a model another name';
CREATE FUNCTION declare_independent_rows(name text, independent boolean) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_declare_independent_rows';
COMMENT ON FUNCTION declare_independent_rows(text, boolean) IS 'says whether queries may predict many rows of a version at a time, in place of what was proven when it was loaded; NULL: as proven';
CREATE FUNCTION drop_model(name text, version integer DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'tessera_drop_model';
COMMENT ON FUNCTION drop_model(text, integer) IS 'drops a model, or one version of it';

-- Tells the planner what predict costs.
CREATE FUNCTION tessera.predict_support(internal) RETURNS internal
    LANGUAGE c STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_predict_support';
COMMENT ON FUNCTION tessera.predict_support(internal) IS 'planner support of predict: its cost, from the floating-point operations of the model';

-- Prediction. The text form takes untyped literals and parameters: predict('m', '{1,2}'), predict($1, $2).
CREATE FUNCTION predict(model text, input real[]) RETURNS real[]
    LANGUAGE c STABLE STRICT PARALLEL SAFE COST 100 SUPPORT tessera.predict_support AS 'MODULE_PATHNAME', 'tessera_predict_real';
COMMENT ON FUNCTION predict(text, real[]) IS 'first output of the model for one row, or for the rows of a two-dimensional array';
CREATE FUNCTION predict(model text, input double precision[]) RETURNS real[]
    LANGUAGE c STABLE STRICT PARALLEL SAFE COST 100 SUPPORT tessera.predict_support AS 'MODULE_PATHNAME', 'tessera_predict_double';
COMMENT ON FUNCTION predict(text, double precision[]) IS 'first output of the model for one row, or for the rows of a two-dimensional array';
CREATE FUNCTION predict(model text, input integer[]) RETURNS real[]
    LANGUAGE c STABLE STRICT PARALLEL SAFE COST 100 SUPPORT tessera.predict_support AS 'MODULE_PATHNAME', 'tessera_predict_integer';
COMMENT ON FUNCTION predict(text, integer[]) IS 'first output of the model for one row, or for the rows of a two-dimensional array';
CREATE FUNCTION predict(model text, input bigint[]) RETURNS real[]
    LANGUAGE c STABLE STRICT PARALLEL SAFE COST 100 SUPPORT tessera.predict_support AS 'MODULE_PATHNAME', 'tessera_predict_bigint';
COMMENT ON FUNCTION predict(text, bigint[]) IS 'first output of the model for one row, or for the rows of a two-dimensional array';
CREATE FUNCTION predict(model text, input numeric[]) RETURNS real[]
    LANGUAGE sql STABLE STRICT PARALLEL SAFE COST 100 RETURN predict(model, input::double precision[]);
COMMENT ON FUNCTION predict(text, numeric[]) IS 'first output of the model for one row, or for the rows of a two-dimensional array';
CREATE FUNCTION predict(model text, input text) RETURNS real[]
    LANGUAGE c STABLE STRICT PARALLEL SAFE COST 100 SUPPORT tessera.predict_support AS 'MODULE_PATHNAME', 'tessera_predict_text';
COMMENT ON FUNCTION predict(text, text) IS 'first output of the model for the rows of an array literal';
CREATE FUNCTION predict(model text, inputs jsonb) RETURNS jsonb
    LANGUAGE c STABLE STRICT PARALLEL SAFE COST 100 SUPPORT tessera.predict_support AS 'MODULE_PATHNAME', 'tessera_predict_jsonb';
COMMENT ON FUNCTION predict(text, jsonb) IS 'outputs of the model by name for inputs by name, as nested arrays';
