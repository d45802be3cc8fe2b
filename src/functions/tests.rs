//! Tests of loading, predicting and the life cycle in one backend, with small models written here byte by byte.

#[pgrx::pg_schema]
mod tests {
    use pgrx::prelude::*;

    /// A protobuf message under construction.
    #[derive(Default, Clone)]
    struct Message(Vec<u8>);

    impl Message {
        fn varint(&mut self, mut v: u64) {
            while v >= 0x80 {
                self.0.push(v as u8 | 0x80);
                v >>= 7;
            }
            self.0.push(v as u8);
        }
        fn int(mut self, field: u64, v: u64) -> Message {
            self.varint(field << 3);
            self.varint(v);
            self
        }
        fn bytes(mut self, field: u64, v: &[u8]) -> Message {
            self.varint(field << 3 | 2);
            self.varint(v.len() as u64);
            self.0.extend_from_slice(v);
            self
        }
        fn text(self, field: u64, v: &str) -> Message {
            self.bytes(field, v.as_bytes())
        }
        fn message(self, field: u64, v: Message) -> Message {
            self.bytes(field, &v.0)
        }
    }

    fn value_info(name: &str, width: u64) -> Message {
        let batch = Message::default().text(2, "N");
        let columns = Message::default().int(1, width);
        let shape = Message::default().message(1, batch).message(1, columns);
        let tensor = Message::default().int(1, 1).message(2, shape);
        Message::default().text(1, name).message(2, Message::default().message(1, tensor))
    }

    /// y = x W, with W of `rows` x `cols` filled by `weight(row, col)`.
    pub fn matmul(rows: u64, cols: u64, weight: impl Fn(u64, u64) -> f32) -> Vec<u8> {
        let raw: Vec<u8> = (0..rows)
            .flat_map(|r| (0..cols).map(move |c| (r, c)))
            .flat_map(|(r, c)| weight(r, c).to_le_bytes())
            .collect();
        let tensor = Message::default().int(1, rows).int(1, cols).int(2, 1).text(8, "W").bytes(9, &raw);
        let node = Message::default().text(1, "x").text(1, "W").text(2, "y").text(3, "product").text(4, "MatMul");
        let graph = Message::default()
            .message(1, node)
            .text(2, "g")
            .message(5, tensor)
            .message(11, value_info("x", rows))
            .message(12, value_info("y", cols));
        Message::default().int(1, 8).message(7, graph).message(8, Message::default().int(2, 13)).0
    }

    fn load(name: &str, model: Vec<u8>) -> i32 {
        Spi::get_one_with_args::<i32>("SELECT load_model($1, $2)", &[name.into(), model.into()])
            .expect("load_model runs")
            .expect("load_model returns a version")
    }

    fn one<T: FromDatum + IntoDatum>(query: &str) -> T {
        Spi::get_one::<T>(query).expect("the query runs").expect("the query has a value")
    }

    /// Runs a statement that must fail, in a subtransaction as any client's error ends in one: SQLSTATE, message, hint.
    fn error_of(statement: &str) -> (String, String, String) {
        let attempt = format!(
            "DO $attempt$ DECLARE code text; message text; hint text; BEGIN
               BEGIN
                 EXECUTE {};
               EXCEPTION WHEN OTHERS THEN
                 GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
               END;
               PERFORM set_config('test.code', coalesce(code, 'none'), true),
                       set_config('test.message', coalesce(message, ''), true), set_config('test.hint', coalesce(hint, ''), true);
             END $attempt$",
            pgrx::spi::quote_literal(statement)
        );
        Spi::run(&attempt).expect("the attempt runs");
        let setting = |name: &str| one::<String>(&format!("SELECT current_setting('test.{name}')"));
        (setting("code"), setting("message"), setting("hint"))
    }

    #[pg_test]
    fn every_array_type_predicts() {
        assert_eq!(load("sum", matmul(3, 2, |r, c| (r + 10 * c) as f32)), 1);
        for input in [
            "'{1,2,3}'::real[]",
            "'{1,2,3}'::float8[]",
            "ARRAY[1.0, 2, 3]",
            "ARRAY[1, 2, 3]",
            "'{1,2,3}'::bigint[]",
            "'{1,2,3}'",
        ] {
            let y: Vec<f32> = one(&format!("SELECT predict('sum', {input})"));
            assert_eq!(y, [8.0, 68.0], "{input}");
        }
        assert!(one::<bool>("SELECT predict('sum', '{{1,0,0},{0,1,0},{0,0,1}}') = '{{0,10},{1,11},{2,12}}'::real[]"));
        let json: pgrx::JsonB = one("SELECT predict('sum', '{\"x\": [[1,2,3]]}'::jsonb)");
        assert_eq!(json.0, serde_json::json!({"y": [[8.0, 68.0]]}));
    }

    #[pg_test]
    fn versions_are_numbered_activated_and_dropped() {
        assert_eq!(load("m", matmul(1, 1, |_, _| 1.0)), 1);
        assert_eq!(load("m", matmul(1, 1, |_, _| 2.0)), 2);
        assert_eq!(one::<Vec<f32>>("SELECT predict('m', '{5}')"), [10.0]);
        assert_eq!(one::<Vec<f32>>("SELECT predict('m@1', '{5}')"), [5.0]);
        Spi::run("SELECT activate_model('m', 1)").expect("activate");
        assert_eq!(one::<Vec<f32>>("SELECT predict('m', '{5}')"), [5.0]);
        Spi::run("SELECT drop_model('m', 2)").expect("drop a version");
        assert_eq!(load("m", matmul(1, 1, |_, _| 3.0)), 3, "numbers are not used again");
        Spi::run("SELECT rename_model('m', 'n')").expect("rename");
        assert_eq!(one::<Vec<f32>>("SELECT predict('n', '{5}')"), [15.0]);
        Spi::run("SELECT drop_model('n')").expect("drop");
        assert_eq!(one::<i64>("SELECT count(*) FROM tessera.weight"), 0);
        assert_eq!(error_of("SELECT predict('n', '{5}')").0, "42704");
    }

    #[pg_test]
    fn a_rolled_back_load_is_gone_and_its_plan_with_it() {
        load("m", matmul(1, 1, |_, _| 1.0));
        Spi::run("CREATE TABLE model (onnx bytea)").expect("table");
        Spi::run_with_args("INSERT INTO model VALUES ($1)", &[matmul(1, 1, |_, _| 7.0).into()]).expect("insert");
        Spi::run(
            "DO $$ BEGIN
               PERFORM load_model('m', onnx) FROM model;
               ASSERT predict('m', '{1}') = '{7}'::real[];
               RAISE EXCEPTION 'undo';
             EXCEPTION WHEN raise_exception THEN END $$",
        )
        .expect("block");
        assert_eq!(one::<Vec<f32>>("SELECT predict('m', '{1}')"), [1.0]);
    }

    #[pg_test]
    fn shared_tensors_are_stored_once() {
        let weight = |r: u64, c: u64| (r * 1031 + c * 7) as f32;
        load("a", matmul(512, 512, weight));
        load("b", matmul(512, 512, weight));
        load("c", matmul(512, 512, |r, c| if (r, c) == (300, 400) { -1.0 } else { weight(r, c) }));
        assert_eq!(
            one::<i64>("SELECT blocks_referenced FROM tessera.storage WHERE relation = 'tessera.weight'::regclass"),
            48
        );
        assert_eq!(one::<i64>("SELECT count(DISTINCT tessera.block_id(data)) FROM tessera.weight"), 17);
        assert_eq!(one::<i64>("SELECT shared_blocks FROM tessera.tensors WHERE model = 'c'"), 15);
    }

    #[pg_test]
    fn an_exported_model_is_the_loaded_one() {
        let model = matmul(300, 200, |r, c| (r as f32).sin() * c as f32);
        load("m", model.clone());
        assert_eq!(one::<Vec<u8>>("SELECT export_model('m')"), model);
        // One statement later, since the object is younger than the snapshot of the statement that made it.
        let object: pg_sys::Oid = one("SELECT export_model_to_large_object('m', 1)");
        assert_eq!(one::<Vec<u8>>(&format!("SELECT lo_get({})", object.to_u32())), model);
        assert_eq!(one::<i32>(&format!("SELECT load_model_from_large_object('again', {})", object.to_u32())), 1);
        assert_eq!(one::<Vec<u8>>("SELECT export_model('again')"), model);
    }

    #[pg_test]
    fn names_are_checked() {
        for name in ["", "a@b", "a\u{1}b", &"x".repeat(64)] {
            let statement = format!("SELECT load_model({}, '\\x00')", pgrx::spi::quote_literal(name));
            let (code, _, hint) = error_of(&statement);
            assert_eq!(code, "42602", "{name:?}");
            assert!(!hint.is_empty());
        }
        load("battery/0042 é", matmul(1, 1, |_, _| 1.0));
        assert_eq!(one::<Vec<f32>>("SELECT predict('battery/0042 é', '{4}')"), [4.0]);
    }

    #[pg_test]
    fn wrong_inputs_say_what_the_model_takes() {
        load("m", matmul(3, 1, |_, _| 1.0));
        for statement in [
            "SELECT predict('m', '{1,2}')",
            "SELECT predict('m', '{1,NULL,3}')",
            "SELECT predict('m', '{}')",
            "SELECT predict('m', '{\"x\": [[1,2]]}'::jsonb)",
            "SELECT predict('m', '{\"z\": [[1,2,3]]}'::jsonb)",
            "SELECT predict('m', '{\"x\": [[1,2,3],[4]]}'::jsonb)",
            "SELECT predict('m', '{\"x\": \"abc\"}')",
            "SELECT predict('m@9', '{1,2,3}')",
            "SELECT predict('m@x', '{1,2,3}')",
        ] {
            let (code, message, hint) = error_of(statement);
            assert!(code != "XX000" && code != "none", "{statement}: {message}");
            assert!(!hint.is_empty(), "{statement}: {message}");
        }
    }

    #[pg_test]
    fn a_domain_carries_owner_and_privileges() {
        load("m", matmul(1, 1, |_, _| 2.0));
        Spi::run(
            "CREATE ROLE tessera_test_user;
             REVOKE USAGE ON DOMAIN tessera_model.m FROM PUBLIC;
             SET LOCAL ROLE tessera_test_user;",
        )
        .expect("roles");
        assert_eq!(error_of("SELECT predict('m', '{1}')").0, "42501");
        assert_eq!(error_of("SELECT drop_model('m')").0, "42501");
        assert_eq!(error_of("SELECT * FROM tessera.weight").0, "42501");
        assert_eq!(one::<i64>("SELECT count(*) FROM tessera.models"), 0);
        Spi::run(
            "RESET ROLE; GRANT USAGE ON DOMAIN tessera_model.m TO tessera_test_user; SET LOCAL ROLE tessera_test_user",
        )
        .expect("grant");
        assert_eq!(one::<Vec<f32>>("SELECT predict('m', '{1}')"), [2.0]);
        // A domain that was moved and renamed still carries its model.
        Spi::run("RESET ROLE; ALTER DOMAIN tessera_model.m SET SCHEMA public; ALTER DOMAIN public.m RENAME TO moved; DROP DOMAIN public.moved")
            .expect("drop");
        assert_eq!(one::<i64>("SELECT count(*) FROM tessera.model"), 0);
    }

    #[pg_test]
    fn every_object_has_a_comment() {
        let missing: Vec<String> = one(
            "SELECT coalesce(array_agg(pg_describe_object(classid, objid, objsubid)), '{}') FROM pg_depend d
             WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
               AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_tessera')
               AND NOT EXISTS (SELECT FROM pg_description c WHERE c.classoid = d.classid AND c.objoid = d.objid AND c.objsubid = 0)
               AND pg_describe_object(classid, objid, objsubid) !~ '(^type .*\\[\\]$)|tests|pgrx'
               AND NOT (classid = 'pg_type'::regclass AND EXISTS (SELECT FROM pg_type t WHERE t.oid = d.objid AND t.typrelid <> 0))
               AND NOT (classid = 'pg_proc'::regclass AND EXISTS (SELECT FROM pg_proc p WHERE p.oid = d.objid AND p.pronamespace = 'tests'::regnamespace))",
        );
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[pg_test]
    fn blocks_convert_and_compare() {
        assert_eq!(one::<Vec<f32>>("SELECT ('{1,2.5}'::real[]::tensor_block)::real[]"), [1.0, 2.5]);
        assert!(one::<bool>(
            "SELECT '{{1,2},{3,4}}'::float8[]::tensor_block = 'float64[2,2]:AAAAAAAA8D8AAAAAAAAAQAAAAAAAAAhAAAAAAAAAEEA='"
        ));
        assert!(one::<bool>(
            "SELECT (b::bytea)::tensor_block = b AND b::text::tensor_block = b FROM tensor_block('int8', '{3}', '\\x010203') b"
        ));
        assert_eq!(
            one::<i64>(
                "SELECT count(DISTINCT b) FROM unnest(ARRAY['int8[1]:AQ==', 'int8[1]:AQ==', 'int8[1]:Ag==']::tensor_block[]) b"
            ),
            2
        );
        assert_eq!(one::<Vec<u8>>("SELECT hash('float32[2]:AACAPwAAAEA='::tensor_block)").len(), 32);
        for text in ["", "float32", "float32[2]:AAAA", "text[1]:AA=="] {
            let (code, _, hint) = error_of(&format!("SELECT '{text}'::tensor_block"));
            assert!(code != "XX000" && code != "none", "{text}");
            assert!(!hint.is_empty(), "{text}");
        }
    }
}
