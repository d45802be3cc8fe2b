-- The type of one block: dtype, shape and bytes.
CREATE TYPE tensor_block;
CREATE FUNCTION tensor_block_in(cstring) RETURNS tensor_block LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_in';
CREATE FUNCTION tensor_block_out(tensor_block) RETURNS cstring LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_out';
CREATE FUNCTION tensor_block_recv(internal) RETURNS tensor_block LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_recv';
CREATE FUNCTION tensor_block_send(tensor_block) RETURNS bytea LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_send';
COMMENT ON FUNCTION tensor_block_in(cstring) IS 'I/O';
COMMENT ON FUNCTION tensor_block_out(tensor_block) IS 'I/O';
COMMENT ON FUNCTION tensor_block_recv(internal) IS 'I/O';
COMMENT ON FUNCTION tensor_block_send(tensor_block) IS 'I/O';
-- Storage EXTERNAL: numbers do not compress, and slices of plain bytes are cheap.
CREATE TYPE tensor_block (
    INPUT = tensor_block_in, OUTPUT = tensor_block_out, RECEIVE = tensor_block_recv, SEND = tensor_block_send,
    INTERNALLENGTH = VARIABLE, ALIGNMENT = int4, STORAGE = external
);
COMMENT ON TYPE tensor_block IS 'a tile of a tensor: dtype, shape and elements';

CREATE FUNCTION tensor_block(dtype text, shape integer[], data bytea) RETURNS tensor_block LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_from_parts';
COMMENT ON FUNCTION tensor_block(text, integer[], bytea) IS 'a tensor block of row-major little-endian elements';
CREATE FUNCTION tensor_block(real[]) RETURNS tensor_block LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_from_real';
COMMENT ON FUNCTION tensor_block(real[]) IS 'a float32 block in the shape of the array';
CREATE FUNCTION tensor_block(double precision[]) RETURNS tensor_block LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_from_double';
COMMENT ON FUNCTION tensor_block(double precision[]) IS 'a float64 block in the shape of the array';
CREATE FUNCTION tensor_block(bytea) RETURNS tensor_block LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_from_bytea';
COMMENT ON FUNCTION tensor_block(bytea) IS 'a tensor block from its binary form';
CREATE FUNCTION tensor_block_to_real(tensor_block) RETURNS real[] LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_to_real';
COMMENT ON FUNCTION tensor_block_to_real(tensor_block) IS 'elements of a block as real[] in its shape';
CREATE FUNCTION tensor_block_to_double(tensor_block) RETURNS double precision[] LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_to_double';
COMMENT ON FUNCTION tensor_block_to_double(tensor_block) IS 'elements of a block as double precision[] in its shape';
CREATE FUNCTION tensor_block_to_bytea(tensor_block) RETURNS bytea LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_to_bytea';
COMMENT ON FUNCTION tensor_block_to_bytea(tensor_block) IS 'binary form of a block';

CREATE CAST (real[] AS tensor_block) WITH FUNCTION tensor_block(real[]) AS ASSIGNMENT;
CREATE CAST (double precision[] AS tensor_block) WITH FUNCTION tensor_block(double precision[]) AS ASSIGNMENT;
CREATE CAST (bytea AS tensor_block) WITH FUNCTION tensor_block(bytea);
CREATE CAST (tensor_block AS real[]) WITH FUNCTION tensor_block_to_real(tensor_block);
CREATE CAST (tensor_block AS double precision[]) WITH FUNCTION tensor_block_to_double(tensor_block);
CREATE CAST (tensor_block AS bytea) WITH FUNCTION tensor_block_to_bytea(tensor_block);
COMMENT ON CAST (real[] AS tensor_block) IS 'a float32 block in the shape of the array';
COMMENT ON CAST (double precision[] AS tensor_block) IS 'a float64 block in the shape of the array';
COMMENT ON CAST (bytea AS tensor_block) IS 'a block from its binary form';
COMMENT ON CAST (tensor_block AS real[]) IS 'elements in the shape of the block';
COMMENT ON CAST (tensor_block AS double precision[]) IS 'elements in the shape of the block';
COMMENT ON CAST (tensor_block AS bytea) IS 'binary form of the block';

CREATE FUNCTION dtype(tensor_block) RETURNS text LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_dtype';
COMMENT ON FUNCTION dtype(tensor_block) IS 'element type of a block';
CREATE FUNCTION shape(tensor_block) RETURNS integer[] LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_shape';
COMMENT ON FUNCTION shape(tensor_block) IS 'dimensions of a block';
CREATE FUNCTION hash(tensor_block) RETURNS bytea LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_hash';
COMMENT ON FUNCTION hash(tensor_block) IS 'BLAKE3 of dtype, shape and elements: the identity of a block';
CREATE FUNCTION data(tensor_block) RETURNS bytea LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_data';
COMMENT ON FUNCTION data(tensor_block) IS 'elements of a block, row-major, little-endian';

-- Comparison, by the binary form: for DISTINCT, GROUP BY and ORDER BY.
CREATE FUNCTION tensor_block_eq(tensor_block, tensor_block) RETURNS boolean LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_eq';
COMMENT ON FUNCTION tensor_block_eq(tensor_block, tensor_block) IS 'implementation of = operator';
CREATE FUNCTION tensor_block_ne(tensor_block, tensor_block) RETURNS boolean LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_ne';
COMMENT ON FUNCTION tensor_block_ne(tensor_block, tensor_block) IS 'implementation of <> operator';
CREATE FUNCTION tensor_block_lt(tensor_block, tensor_block) RETURNS boolean LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_lt';
COMMENT ON FUNCTION tensor_block_lt(tensor_block, tensor_block) IS 'implementation of < operator';
CREATE FUNCTION tensor_block_le(tensor_block, tensor_block) RETURNS boolean LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_le';
COMMENT ON FUNCTION tensor_block_le(tensor_block, tensor_block) IS 'implementation of <= operator';
CREATE FUNCTION tensor_block_gt(tensor_block, tensor_block) RETURNS boolean LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_gt';
COMMENT ON FUNCTION tensor_block_gt(tensor_block, tensor_block) IS 'implementation of > operator';
CREATE FUNCTION tensor_block_ge(tensor_block, tensor_block) RETURNS boolean LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_ge';
COMMENT ON FUNCTION tensor_block_ge(tensor_block, tensor_block) IS 'implementation of >= operator';
CREATE OPERATOR = (FUNCTION = tensor_block_eq, LEFTARG = tensor_block, RIGHTARG = tensor_block, COMMUTATOR = =, NEGATOR = <>, RESTRICT = eqsel, JOIN = eqjoinsel, HASHES, MERGES);
COMMENT ON OPERATOR = (tensor_block, tensor_block) IS 'equal';
CREATE OPERATOR <> (FUNCTION = tensor_block_ne, LEFTARG = tensor_block, RIGHTARG = tensor_block, COMMUTATOR = <>, NEGATOR = =, RESTRICT = neqsel, JOIN = neqjoinsel);
COMMENT ON OPERATOR <> (tensor_block, tensor_block) IS 'not equal';
CREATE OPERATOR < (FUNCTION = tensor_block_lt, LEFTARG = tensor_block, RIGHTARG = tensor_block, COMMUTATOR = >, NEGATOR = >=, RESTRICT = scalarltsel, JOIN = scalarltjoinsel);
COMMENT ON OPERATOR < (tensor_block, tensor_block) IS 'less than';
CREATE OPERATOR <= (FUNCTION = tensor_block_le, LEFTARG = tensor_block, RIGHTARG = tensor_block, COMMUTATOR = >=, NEGATOR = >, RESTRICT = scalarlesel, JOIN = scalarlejoinsel);
COMMENT ON OPERATOR <= (tensor_block, tensor_block) IS 'less than or equal';
CREATE OPERATOR > (FUNCTION = tensor_block_gt, LEFTARG = tensor_block, RIGHTARG = tensor_block, COMMUTATOR = <, NEGATOR = <=, RESTRICT = scalargtsel, JOIN = scalargtjoinsel);
COMMENT ON OPERATOR > (tensor_block, tensor_block) IS 'greater than';
CREATE OPERATOR >= (FUNCTION = tensor_block_ge, LEFTARG = tensor_block, RIGHTARG = tensor_block, COMMUTATOR = <=, NEGATOR = <, RESTRICT = scalargesel, JOIN = scalargejoinsel);
COMMENT ON OPERATOR >= (tensor_block, tensor_block) IS 'greater than or equal';
CREATE FUNCTION tensor_block_cmp(tensor_block, tensor_block) RETURNS integer LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_cmp';
COMMENT ON FUNCTION tensor_block_cmp(tensor_block, tensor_block) IS 'less-equal-greater';
CREATE FUNCTION tensor_block_hash(tensor_block) RETURNS integer LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'tessera_block_hash32';
COMMENT ON FUNCTION tensor_block_hash(tensor_block) IS 'hash';
CREATE OPERATOR CLASS tensor_block_ops DEFAULT FOR TYPE tensor_block USING btree AS
    OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =, OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 tensor_block_cmp(tensor_block, tensor_block);
COMMENT ON OPERATOR CLASS tensor_block_ops USING btree IS 'order of the binary form';
CREATE OPERATOR CLASS tensor_block_hash_ops DEFAULT FOR TYPE tensor_block USING hash AS
    OPERATOR 1 =, FUNCTION 1 tensor_block_hash(tensor_block);
COMMENT ON OPERATOR CLASS tensor_block_hash_ops USING hash IS 'content hash';
COMMENT ON OPERATOR FAMILY tensor_block_ops USING btree IS 'order of the binary form';
COMMENT ON OPERATOR FAMILY tensor_block_hash_ops USING hash IS 'content hash';
