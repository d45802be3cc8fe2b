-- The tour of `make demo`. What it made before is dropped first, and only that.
SET client_min_messages = warning;
DROP SCHEMA IF EXISTS demo CASCADE;
CREATE SCHEMA demo;
SET search_path = demo, public;
SELECT drop_model(name) FROM (SELECT DISTINCT name FROM tessera.models
    WHERE name IN ('file_type', 'sentences', 'reader', 'fraud', 'encoder', 'encoder_copy', 'encoder_tuned')) AS old \g /dev/null
RESET client_min_messages;
\set ECHO all

-- 1. A file-type classifier (3 MB, convolutions), out of a server file, transactional like any DDL.

SELECT load_model_from_file('file_type', :'models' || '/magika.onnx');
SELECT name, dtype, shape FROM tessera.model_inputs WHERE model = 'file_type';

CREATE TABLE files (name text, content bytea);
CREATE TABLE file_types (position int, label text);
\copy files FROM 'target/models/demo/files.csv' CSV
\copy file_types FROM 'target/models/demo/file_types.csv' CSV

-- It looks at the first and the last 1,024 bytes of a file; 256 stands for none.
CREATE FUNCTION features(content bytea) RETURNS int[] LANGUAGE sql IMMUTABLE AS $$
    SELECT array_agg(CASE WHEN i < length(head) THEN get_byte(head, i)
                          WHEN i >= 2048 - length(tail) THEN get_byte(tail, i - 2048 + length(tail))
                          ELSE 256 END ORDER BY i)
    FROM (SELECT ltrim(substr(content, 1, 1024), '\x20090a0d') AS head,
                 rtrim(substr(content, greatest(length(content) - 1023, 1)), '\x20090a0d') AS tail) AS ends,
         generate_series(0, 2047) AS i
$$;

-- A prediction is an expression over a row.
SELECT name, length(content) AS bytes, label, round(score::numeric, 4) AS score
FROM files,
     LATERAL unnest(predict('file_type', features(content))) WITH ORDINALITY AS answer (score, position)
     JOIN file_types USING (position)
WHERE score > 0.5
ORDER BY name;

-- 2. A sentence encoder (MiniLM, a transformer, 69 MB), and search by meaning. Inputs by name, as JSON.

SELECT load_model_from_file('sentences', :'models' || '/minilm.onnx');

CREATE TABLE tickets (text text, tokens int[], meaning real[]);
INSERT INTO tickets (text, tokens) VALUES
    ('My credit card was charged twice',    '{101,2026,4923,4003,2001,5338,3807,102}'),
    ('The parcel never arrived at my door', '{101,1996,20463,2196,3369,2012,2026,2341,102}'),
    ('Where is my delivery?',               '{101,2073,2003,2026,6959,1029,102}'),
    ('How do I reset my password?',         '{101,2129,2079,1045,25141,2026,20786,1029,102}'),
    ('I cannot log in to my account',       '{101,1045,3685,8833,1999,2000,2026,4070,102}'),
    ('The weather is lovely today',         '{101,1996,4633,2003,8403,2651,102}');

CREATE FUNCTION embed(tokens int[]) RETURNS real[] LANGUAGE sql STABLE AS $$
    SELECT array_agg(value::real ORDER BY position)
    FROM jsonb_array_elements_text(predict('sentences', jsonb_build_object(
             'input_ids', jsonb_build_array(to_jsonb(tokens)),
             'attention_mask', jsonb_build_array(to_jsonb(array_fill(1, ARRAY[cardinality(tokens)]))))) -> '461' -> 0)
         WITH ORDINALITY AS e (value, position)
$$;
CREATE FUNCTION similarity(a real[], b real[]) RETURNS numeric LANGUAGE sql IMMUTABLE AS $$
    SELECT round((sum(x * y) / sqrt(sum(x * x) * sum(y * y)))::numeric, 3) FROM unnest(a, b) AS pair (x, y)
$$;
UPDATE tickets SET meaning = embed(tokens);

-- 'I was billed two times for one order'
SELECT text, similarity(meaning, embed('{101,1045,2001,14843,2048,2335,2005,2028,2344,102}'))
FROM tickets ORDER BY similarity DESC LIMIT 3;

-- 3. A reader of printed lines (11 MB, convolutions and attention): the picture is in a table too.

SELECT load_model_from_file('reader', :'models' || '/ocr_read.onnx');

CREATE TABLE pictures (name text, pixels jsonb);
CREATE TABLE letters (position int PRIMARY KEY, letter text);
\copy pictures FROM 'target/models/demo/pictures.csv' CSV
\copy letters FROM 'target/models/demo/letters.csv' CSV

-- Each step of the answer has a score for each of 6,625 letters; repeats and blanks (position 1) are dropped.
WITH answer AS MATERIALIZED (
    SELECT name, predict('reader', jsonb_build_object('x', pixels)) -> 'softmax_11.tmp_0' -> 0 AS steps FROM pictures
), best AS (
    SELECT name, step, (SELECT position FROM jsonb_array_elements(scores) WITH ORDINALITY AS s (score, position)
                        ORDER BY score DESC LIMIT 1) AS position
    FROM answer, jsonb_array_elements(steps) WITH ORDINALITY AS t (scores, step)
), changed AS (
    SELECT *, lag(position) OVER (PARTITION BY name ORDER BY step) AS before FROM best
)
SELECT name, string_agg(letter, '' ORDER BY step) AS line
FROM changed JOIN letters USING (position)
WHERE position > 1 AND position IS DISTINCT FROM before
GROUP BY name;

-- 4. Predictions over a table.

SELECT load_model_from_file('fraud', :'models' || '/fraud_fc_256.onnx');
CREATE TABLE transactions AS
SELECT id, (SELECT array_agg(sin(id * k)::real ORDER BY k) FROM generate_series(1, 28) AS k) AS features
FROM generate_series(1, 10000) AS id;
SELECT count(*) FILTER (WHERE answer[2] > 0.9) AS suspicious, count(*) AS "all"
FROM (SELECT predict('fraud', features) AS answer FROM transactions) AS answers;

-- 5. Weights are tensor blocks, stored once however many models contain them: the same encoder twice (10 MB each),
--    and a variant whose last layer was trained again.

SELECT load_model_from_file('encoder', :'models' || '/encoder_fc.onnx');
SELECT pg_size_pretty(pg_total_relation_size('tessera.weight')) AS weights;
SELECT load_model_from_file('encoder_copy', :'models' || '/encoder_fc.onnx');
SELECT load_model_from_file('encoder_tuned', :'models' || '/encoder_fc_tuned.onnx');
SELECT pg_size_pretty(pg_total_relation_size('tessera.weight')) AS weights;
SELECT model, name, dims, blocks, shared_blocks FROM tessera.tensors WHERE model = 'encoder_tuned' ORDER BY ordinal;
SELECT relation, blocks_referenced, blocks_stored, deduplication_ratio FROM tessera.storage;

-- 6. A new version is active once it is committed; the old one stays within reach.

BEGIN;
SELECT load_model_from_file('fraud', :'models' || '/fraud_fc_512.onnx');
SELECT predict('fraud', features) AS new, predict('fraud@1', features) AS old FROM transactions LIMIT 1;
ROLLBACK;
SELECT name, version, active, parameters, bytes_loaded, bytes_stored FROM tessera.models ORDER BY name, version;
