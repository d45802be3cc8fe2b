//! Tests of reading tensors' data: from typed fields, and from other files.

use super::tests::*;
use super::wire::{write_bytes, write_varint};
use super::*;
use crate::error::ErrorKind::*;
use prost::Message;
use tensor_blocks::DType::*;
use tract_onnx::pb::*;

/// Files by name.
struct Files(Vec<(&'static str, Vec<u8>)>);

impl ExternalData for Files {
    fn read(&mut self, location: &str, offset: u64, length: Option<u64>) -> Result<Vec<u8>, ModelError> {
        let file = self.0.iter().find(|(name, _)| *name == location);
        let file = &file.ok_or_else(|| ModelError::external_data_missing("no such file"))?.1;
        let from = &file[offset as usize..];
        Ok(from[..length.map_or(from.len(), |length| length as usize)].to_vec())
    }
}

fn stored(tensor: &[u8]) -> Result<(DType, Vec<u8>), ModelError> {
    let model = model_with(tensor);
    let stripped = strip_all(&model)?;
    let tensor = &stripped.tensors[0];
    Ok((tensor.dtype, tensor.data.to_vec()))
}

/// A tensor "w" of one dimension whose values stand in field `number`, as varints; also unpacked and in two runs.
fn varint_forms(code: i32, dim: i64, number: u32, values: &[i64]) -> [Vec<u8>; 3] {
    let head = TensorProto { name: "w".into(), data_type: code, dims: vec![dim], ..Default::default() };
    let pack = |values: &[i64]| {
        let mut run = Vec::new();
        values.iter().for_each(|&value| write_varint(&mut run, value as u64));
        run
    };
    let [mut packed, mut unpacked, mut split] = [(); 3].map(|_| head.encode_to_vec());
    write_bytes(&mut packed, number, &pack(values));
    for &value in values {
        write_varint(&mut unpacked, u64::from(number) << 3);
        write_varint(&mut unpacked, value as u64);
    }
    write_bytes(&mut split, number, &pack(&values[..1]));
    write_bytes(&mut split, number, &pack(&values[1..]));
    [packed, unpacked, split]
}

#[test]
fn integers_in_typed_fields() {
    type Case = (DType, i64, u32, &'static [i64], &'static [u8]);
    let cases: [Case; 14] = [
        (Int32, 3, 5, &[-1, 2, i32::MIN as i64], &[255, 255, 255, 255, 2, 0, 0, 0, 0, 0, 0, 128]),
        (Int16, 2, 5, &[-2, 300], &[254, 255, 44, 1]),
        (UInt16, 2, 5, &[65535, 1], &[255, 255, 1, 0]),
        (Int8, 2, 5, &[-128, 127], &[128, 127]),
        (UInt8, 2, 5, &[255, 0], &[255, 0]),
        (Bool, 3, 5, &[1, 0, 1], &[1, 0, 1]),
        (Float16, 2, 5, &[0x3c00, 0xbc00], &[0, 0x3c, 0, 0xbc]),
        (BFloat16, 2, 5, &[0x3f80, -0x4080], &[0x80, 0x3f, 0x80, 0xbf]),
        (Float8E4M3FN, 2, 5, &[0x38, 0xb8], &[0x38, 0xb8]),
        (UInt4, 3, 5, &[0x21, 0x03], &[0x21, 0x03]),
        (Int2, 5, 5, &[0xe4, 0x01], &[0xe4, 0x01]),
        (
            Int64,
            2,
            7,
            &[-1, i64::MAX],
            &[255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 127],
        ),
        (UInt64, 2, 11, &[-1, 1], &[255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0, 0, 0, 0, 0]),
        (UInt32, 2, 11, &[u32::MAX as i64, 1], &[255, 255, 255, 255, 1, 0, 0, 0]),
    ];
    for (dtype, dim, number, values, expected) in cases {
        for form in varint_forms(dtype.onnx_code(), dim, number, values) {
            assert_eq!(stored(&form).unwrap(), (dtype, expected.to_vec()), "{dtype}");
        }
        // One value too few, one too many, and the neighbour field.
        for form in varint_forms(dtype.onnx_code(), dim * 4, number, values) {
            assert_eq!(stored(&form).unwrap_err().kind, InvalidModel, "{dtype}");
        }
        let more = [values, &[0]].concat();
        for form in varint_forms(dtype.onnx_code(), dim, number, &more) {
            assert_eq!(stored(&form).unwrap_err().kind, InvalidModel, "{dtype}");
        }
        let wrong = if number == 7 { 11 } else { 7 };
        assert_eq!(stored(&varint_forms(dtype.onnx_code(), dim, wrong, values)[0]).unwrap_err().kind, InvalidModel);
    }
    for (dtype, number, value) in [(Int8, 5, 128), (UInt8, 5, -1), (Bool, 5, 2), (UInt16, 5, -1), (UInt32, 11, 1 << 32)]
    {
        let form = &varint_forms(dtype.onnx_code(), 2, number, &[0, value])[0];
        let error = stored(form).unwrap_err();
        assert_eq!(error.kind, InvalidModel);
        assert!(error.detail.unwrap().contains(&value.to_string()));
    }
}

#[test]
fn floats_in_typed_fields() {
    let float_data = vec![1.5f32, -0.0, f32::NAN, f32::MAX];
    let double_data = vec![1.5f64, -0.0, f64::INFINITY, 1e300];
    let doubles: Vec<u8> = double_data.iter().flat_map(|value| value.to_le_bytes()).collect();
    let cases = [
        (Float32, 4, float_data.clone(), vec![], le(&float_data)),
        (Complex64, 2, float_data.clone(), vec![], le(&float_data)),
        (Float64, 4, vec![], double_data.clone(), doubles.clone()),
        (Complex128, 2, vec![], double_data.clone(), doubles.clone()),
    ];
    for (dtype, dim, float_data, double_data, expected) in cases {
        let data_type = dtype.onnx_code();
        let mut tensor = TensorProto { name: "w".into(), data_type, dims: vec![dim], ..Default::default() };
        // Unpacked, as writers of proto2 without packing do.
        let mut unpacked = tensor.encode_to_vec();
        for value in &float_data {
            write_varint(&mut unpacked, 4 << 3 | 5);
            unpacked.extend_from_slice(&value.to_le_bytes());
        }
        for value in &double_data {
            write_varint(&mut unpacked, 10 << 3 | 1);
            unpacked.extend_from_slice(&value.to_le_bytes());
        }
        assert_eq!(stored(&unpacked).unwrap(), (dtype, expected.clone()));
        (tensor.float_data, tensor.double_data) = (float_data, double_data);
        assert_eq!(stored(&tensor.encode_to_vec()).unwrap(), (dtype, expected));
        tensor.dims = vec![dim, 2];
        assert_eq!(stored(&tensor.encode_to_vec()).unwrap_err().kind, InvalidModel);
    }
}

pub(super) fn external(name: &str, dims: &[i64], entries: &[(&str, &str)]) -> TensorProto {
    let entry = |&(key, value): &(&str, &str)| StringStringEntryProto { key: key.into(), value: value.into() };
    TensorProto {
        data_location: Some(1),
        external_data: entries.iter().map(entry).collect(),
        ..raw(name, 1, dims, vec![])
    }
}

#[test]
fn external_data_are_taken_in() {
    let file = le(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let inline = tensor_attribute("value", external("v", &[2], &[("location", "data"), ("offset", "16")]));
    let nodes = vec![node("ConstantOfShape", &["s"], "y", vec![inline])];
    let tensors = vec![
        external("a", &[2], &[("location", "data"), ("offset", "4"), ("length", "8"), ("checksum", "0")]),
        // A model that names our own location is read like any other.
        external("b", &[1], &[("location", "tessera"), ("offset", "0")]),
        external("c", &[0], &[("location", "data")]),
    ];
    let bytes = model(graph(nodes, tensors)).encode_to_vec();
    let mut files = Files(vec![("data", file), ("tessera", le(&[9.0]))]);
    let stripped = strip(&bytes, &mut files, &mut || Ok(())).unwrap();
    let data: Vec<_> = stripped.tensors.iter().map(|tensor| tensor.data.to_vec()).collect();
    assert_eq!(data, [le(&[1.0, 2.0]), le(&[9.0]), vec![]]);
    let merged = ModelProto::decode(&merge_all(&stripped)[..]).unwrap().graph.unwrap();
    for (tensor, expected) in merged.initializer.iter().zip(&data) {
        assert_eq!(&tensor.raw_data, expected);
        assert_eq!((tensor.data_location, tensor.external_data.len()), (None, 0));
    }
    let value = merged.node[0].attribute[0].t.as_ref().unwrap();
    assert_eq!((&value.raw_data, value.data_location), (&le(&[4.0, 5.0]), None));
    assert_eq!(strip(&bytes, &mut NoExternalData, &mut || Ok(())).unwrap_err().kind, ExternalDataMissing);
}

#[test]
fn external_data_that_contradict_themselves_are_refused() {
    let both = TensorProto { raw_data: le(&[1.0]), ..external("w", &[1], &[("location", "f")]) };
    let strings = TensorProto { data_type: 8, ..external("w", &[1], &[("location", "f")]) };
    let cases = [
        (external("w", &[1], &[]), InvalidModel),
        (external("w", &[1], &[("location", "f"), ("offset", "-1")]), InvalidModel),
        (external("w", &[1], &[("location", "f"), ("offset", "18446744073709551615")]), InvalidModel),
        (external("w", &[1], &[("location", "f"), ("length", "x")]), InvalidModel),
        (external("w", &[1], &[("location", "f"), ("length", "5")]), InvalidModel),
        (external("w", &[1], &[("location", "f")]), ExternalDataMissing),
        (TensorProto { data_location: Some(2), ..external("w", &[1], &[("location", "f")]) }, InvalidModel),
        (both, InvalidModel),
        (strings, UnsupportedType),
    ];
    for (tensor, kind) in cases {
        assert_eq!(stored(&tensor.encode_to_vec()).unwrap_err().kind, kind, "{tensor:?}");
    }
    let sparse = SparseTensorProto { values: Some(external("s", &[1], &[("location", "f")])), ..Default::default() };
    let mut with_sparse = graph(vec![node("Identity", &["s"], "y", vec![])], vec![]);
    with_sparse.sparse_initializer = vec![sparse];
    assert_eq!(strip_all(&model(with_sparse).encode_to_vec()).unwrap_err().kind, UnsupportedType);
}

#[test]
fn a_tensor_that_only_looks_stored_is_left_alone() {
    let entries = [("location", LOCATION), ("offset", "0")];
    let disguised = TensorProto { data_location: None, raw_data: le(&[3.0]), ..external("v", &[1], &entries) };
    let fill = node("ConstantOfShape", &["s"], "y", vec![tensor_attribute("value", disguised)]);
    let bytes = model(graph(vec![fill], vec![floats("w", &[1], 1.0)])).encode_to_vec();
    let stripped = strip_all(&bytes).unwrap();
    assert_eq!(stripped.tensors.len(), 1);
    assert_eq!(stored_tensors(&stripped.graph).unwrap().len(), 1);
    assert_eq!(merge_all(&stripped), bytes);
}
