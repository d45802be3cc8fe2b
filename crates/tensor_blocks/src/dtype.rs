//! Element types.
//!
//! Responsible for: the fixed-width element types of ONNX (`TensorProto.DataType`), their codes, their names and
//! the size of a run of elements. Strings have no fixed width and are not here.
//!
//! Invariants:
//! - codes are ONNX's and are stored on disk: a released code never changes meaning;
//! - types narrower than a byte are packed, first element in the low bits, and the last byte is padded with zeros.

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;

macro_rules! dtypes {
    ($($variant:ident = $code:literal, $name:literal, $bits:literal;)*) => {
        /// A fixed-width element type; the discriminant is the code of ONNX's `TensorProto.DataType`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum DType {
            $($variant = $code,)*
        }

        impl DType {
            /// Every element type, by ascending code.
            pub const ALL: &'static [DType] = &[$(DType::$variant,)*];

            /// The type with this ONNX code; none for UNDEFINED (0), STRING (8) and codes that are not known.
            pub const fn from_onnx(code: i32) -> Option<DType> {
                match code {
                    $($code => Some(DType::$variant),)*
                    _ => None,
                }
            }

            /// NumPy's name where NumPy has the type, else ONNX's in lower case: "float32", "bool", "float8e4m3fn".
            pub const fn name(self) -> &'static str {
                match self {
                    $(DType::$variant => $name,)*
                }
            }

            /// The type with this [`name`](DType::name).
            pub fn from_name(name: &str) -> Option<DType> {
                match name {
                    $($name => Some(DType::$variant),)*
                    _ => None,
                }
            }

            /// Width of one element in bits: 2, 4, or a multiple of 8.
            pub const fn bits(self) -> u32 {
                match self {
                    $(DType::$variant => $bits,)*
                }
            }
        }
    };
}

dtypes! {
    Float32 = 1, "float32", 32;
    UInt8 = 2, "uint8", 8;
    Int8 = 3, "int8", 8;
    UInt16 = 4, "uint16", 16;
    Int16 = 5, "int16", 16;
    Int32 = 6, "int32", 32;
    Int64 = 7, "int64", 64;
    Bool = 9, "bool", 8;
    Float16 = 10, "float16", 16;
    Float64 = 11, "float64", 64;
    UInt32 = 12, "uint32", 32;
    UInt64 = 13, "uint64", 64;
    Complex64 = 14, "complex64", 64;
    Complex128 = 15, "complex128", 128;
    BFloat16 = 16, "bfloat16", 16;
    Float8E4M3FN = 17, "float8e4m3fn", 8;
    Float8E4M3FNUZ = 18, "float8e4m3fnuz", 8;
    Float8E5M2 = 19, "float8e5m2", 8;
    Float8E5M2FNUZ = 20, "float8e5m2fnuz", 8;
    UInt4 = 21, "uint4", 4;
    Int4 = 22, "int4", 4;
    Float4E2M1 = 23, "float4e2m1", 4;
    Float8E8M0 = 24, "float8e8m0", 8;
    UInt2 = 25, "uint2", 2;
    Int2 = 26, "int2", 2;
}

impl DType {
    /// The code of ONNX's `TensorProto.DataType`.
    pub const fn onnx_code(self) -> i32 {
        self as i32
    }

    /// Bytes of one element; none for types narrower than a byte.
    pub const fn byte_width(self) -> Option<usize> {
        if self.bits() < 8 { None } else { Some(self.bits() as usize / 8) }
    }

    /// True for types that pack several elements into one byte.
    pub const fn is_packed(self) -> bool {
        self.bits() < 8
    }

    /// Bytes of `elements` elements in a row, rounded up to whole bytes; none if that does not fit 64 bits.
    pub const fn byte_len(self, elements: u64) -> Option<u64> {
        match self.byte_width() {
            Some(width) => elements.checked_mul(width as u64),
            None => Some(elements.div_ceil(8 / self.bits() as u64)),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for DType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for DType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
        let name = std::borrow::Cow::<str>::deserialize(deserializer)?;
        DType::from_name(&name).ok_or_else(|| D::Error::custom(format!("unknown element type \"{name}\"")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_are_one_to_one() {
        let mut names = std::collections::HashSet::new();
        for &dtype in DType::ALL {
            assert_eq!(DType::from_onnx(dtype.onnx_code()), Some(dtype));
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
            assert!(names.insert(dtype.name()));
            let json = serde_json::to_string(&dtype).unwrap();
            assert_eq!(json, format!("\"{}\"", dtype.name()));
            assert_eq!(serde_json::from_str::<DType>(&json).unwrap(), dtype);
        }
        assert_eq!(DType::ALL.len(), 25);
        for code in [i32::MIN, -1, 0, 8, 27, i32::MAX] {
            assert_eq!(DType::from_onnx(code), None);
        }
        assert!(serde_json::from_str::<DType>("\"string\"").is_err());
    }

    #[test]
    fn sizes_follow_onnx() {
        assert_eq!(DType::Float32.byte_len(3), Some(12));
        assert_eq!(DType::Bool.byte_len(3), Some(3));
        assert_eq!(DType::Complex128.byte_len(3), Some(48));
        assert_eq!(DType::Int4.byte_len(0), Some(0));
        assert_eq!(DType::Int4.byte_len(3), Some(2));
        assert_eq!(DType::UInt2.byte_len(5), Some(2));
        assert_eq!(DType::UInt4.byte_len(u64::MAX), Some(1 << 63));
        assert_eq!(DType::Float32.byte_len(u64::MAX / 4), Some(u64::MAX - 3));
        assert_eq!(DType::Float32.byte_len(u64::MAX / 4 + 1), None);
    }
}
