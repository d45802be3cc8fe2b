-- The access method of tables whose wide values are stored once however many rows hold them.
CREATE FUNCTION tensor_block_handler(internal) RETURNS table_am_handler
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'tensor_block_handler';
COMMENT ON FUNCTION tensor_block_handler(internal) IS 'handler of access method tensor_block';

CREATE ACCESS METHOD tensor_block TYPE TABLE HANDLER tensor_block_handler;
COMMENT ON ACCESS METHOD tensor_block IS 'heap rows with deduplicated wide values in a block store';
