//! Smaller forms of a block, from which it comes back bit for bit.
//!
//! ```text
//!  the block      | head: dtype, shape | elements                       |
//!  its small form | head: the same     | body                  |
//!
//!  constant          one element, of which all others are copies
//!  bfloat16          float32 elements whose low 16 bits are zero: the high 16 bits
//!  float16           float32 elements that float16 has: these
//!  float32           float64 elements that float32 has: these
//!  ... in planes     what any of them, or none, leaves: cut into byte planes, each in Huffman's code where that pays
//! ```
//! Responsible for: choosing a form ([`encode`]), its code, and the way back ([`Encoded`]).
//!
//! Invariants:
//! - the code of a form ([`Encoding::code`]) stands on disk: a released one never changes meaning;
//! - a form is chosen only if it gives the block's own bytes: NaN's payloads, signs of zeros and subnormal numbers included,
//!   whatever the processor's floating-point mode, because only integers are computed with;
//! - hostile bytes give an error: nothing is allocated by what they say, only by what the caller has room for.

mod huffman;
mod narrow;
mod planes;

use crate::DType;
use crate::block::split_head;
use narrow::Narrow;

/// In what form a block is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Encoding {
    form: Form,
    planes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Form {
    /// The elements as they are.
    Plain,
    /// The first element, for all.
    Constant,
    /// Elements of half the width.
    Narrow(Narrow),
}

/// Bit of the code that says that the body is in planes.
const PLANES: u8 = 0x10;

/// What may be spent on a smaller form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Only forms that cost next to nothing: constants and narrow elements.
    None,
    /// Byte planes in Huffman's code besides, where they save a tenth.
    Huffman,
}

/// Why a small form cannot be turned back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodingError {
    /// No block's head at its beginning.
    #[error("it does not begin with the head of a tensor block")]
    Head,
    /// The form is none for elements of this type.
    #[error("elements of type {0} have no such form")]
    Form(DType),
    /// The body is shorter or longer than its form and the shape say.
    #[error("the body has {found} bytes where {expected} are expected")]
    Body {
        /// Bytes that the form takes.
        expected: usize,
        /// Bytes that were there.
        found: usize,
    },
    /// The block is not as large as the caller expects.
    #[error("the block has {found} bytes of elements where {expected} are expected")]
    Length {
        /// Bytes that there is room for.
        expected: usize,
        /// Bytes that the head says.
        found: u64,
    },
    /// A plane's lengths or its code are damaged.
    #[error("byte plane {0} cannot be decoded")]
    Plane(usize),
}

impl Encoding {
    /// A block as it is.
    pub const PLAIN: Encoding = Encoding { form: Form::Plain, planes: false };

    /// The number that stands for this form on disk; 0 for [`Encoding::PLAIN`].
    pub const fn code(self) -> u8 {
        let form = match self.form {
            Form::Plain => 0,
            Form::Constant => 1,
            Form::Narrow(Narrow::BFloat16) => 2,
            Form::Narrow(Narrow::Float16) => 3,
            Form::Narrow(Narrow::Float32) => 4,
        };
        if self.planes { form | PLANES } else { form }
    }

    /// The form with this code; none if this version does not know it.
    pub const fn from_code(code: u8) -> Option<Encoding> {
        let form = match code & !PLANES {
            0 => Form::Plain,
            1 if code == 1 => Form::Constant,
            2 => Form::Narrow(Narrow::BFloat16),
            3 => Form::Narrow(Narrow::Float16),
            4 => Form::Narrow(Narrow::Float32),
            _ => return None,
        };
        Some(Encoding { form, planes: code & PLANES != 0 })
    }

    /// True for a block that is stored as it is.
    pub fn is_plain(self) -> bool {
        self == Encoding::PLAIN
    }

    /// "constant", "bfloat16", "float16", "float32", "huffman", or one of the middle three with "+huffman"; none for
    /// [`Encoding::PLAIN`].
    pub const fn name(self) -> Option<&'static str> {
        Some(match (self.form, self.planes) {
            (Form::Plain, false) => return None,
            (Form::Plain, true) => "huffman",
            (Form::Constant, _) => "constant",
            (Form::Narrow(Narrow::BFloat16), false) => "bfloat16",
            (Form::Narrow(Narrow::Float16), false) => "float16",
            (Form::Narrow(Narrow::Float32), false) => "float32",
            (Form::Narrow(Narrow::BFloat16), true) => "bfloat16+huffman",
            (Form::Narrow(Narrow::Float16), true) => "float16+huffman",
            (Form::Narrow(Narrow::Float32), true) => "float32+huffman",
        })
    }
}

/// The smallest form of a block that is allowed, with its bytes. `value` is the block's binary form. None if it is best stored
/// as it is, or is no block.
pub fn encode(value: &[u8], compression: Compression) -> Option<(Encoding, Vec<u8>)> {
    let (dtype, elements, bytes) = split_head(value).ok()?;
    if bytes != elements.len() as u64 || elements.is_empty() {
        return None;
    }
    let head = &value[..value.len() - elements.len()];
    let width = width_of(dtype);
    if elements[width..] == elements[..elements.len() - width] {
        let small = [head, &elements[..width]].concat();
        return (small.len() < value.len()).then_some((Encoding { form: Form::Constant, planes: false }, small));
    }
    let narrow = Narrow::ALL.into_iter().find(|narrow| narrow.fits(dtype, elements));
    let mut small = head.to_vec();
    let (form, plain) = match narrow {
        Some(narrow) => {
            small.reserve_exact(elements.len() / 2);
            narrow.narrow(elements, &mut small);
            (Form::Narrow(narrow), narrow.dtype())
        }
        None => (Form::Plain, dtype),
    };
    if compression == Compression::Huffman {
        let body = if narrow.is_some() { &small[head.len()..] } else { elements };
        if let Some(planes) = planes::compress(plain, body) {
            small.truncate(head.len());
            small.extend_from_slice(&planes);
            return Some((Encoding { form, planes: true }, small));
        }
    }
    narrow.is_some().then_some((Encoding { form, planes: false }, small))
}

/// A block in a small form, its head read.
#[derive(Clone, Copy, Debug)]
pub struct Encoded<'a> {
    encoding: Encoding,
    dtype: DType,
    /// Bytes of the block's elements.
    bytes: u64,
    head: &'a [u8],
    body: &'a [u8],
}

impl<'a> Encoded<'a> {
    /// Reads the head of a small form.
    ///
    /// # Errors
    /// If there is none, or the form is not one for the type of the elements.
    pub fn open(encoding: Encoding, stored: &'a [u8]) -> Result<Encoded<'a>, EncodingError> {
        let (dtype, body, bytes) = split_head(stored).map_err(|_| EncodingError::Head)?;
        if let Form::Narrow(narrow) = encoding.form
            && narrow.of() != dtype
        {
            return Err(EncodingError::Form(dtype));
        }
        Ok(Encoded { encoding, dtype, bytes, head: &stored[..stored.len() - body.len()], body })
    }

    /// Bytes of the block's binary form before the elements.
    pub fn head_len(&self) -> usize {
        self.head.len()
    }

    /// Bytes of the block's binary form, saturated.
    pub fn value_len(&self) -> u64 {
        self.bytes.saturating_add(self.head.len() as u64)
    }

    /// Fills `out` with the block's binary form.
    ///
    /// # Errors
    /// If that has another length, or the body is damaged; `out` has anything then.
    pub fn value_into(&self, out: &mut [u8]) -> Result<(), EncodingError> {
        let room = out.len().saturating_sub(self.head.len());
        match out.split_at_mut_checked(self.head.len()) {
            Some((head, elements)) => {
                head.copy_from_slice(self.head);
                self.elements_into(elements)
            }
            None => Err(EncodingError::Length { expected: room, found: self.bytes }),
        }
    }

    /// Fills `out` with the block's elements.
    ///
    /// # Errors
    /// As of [`Encoded::value_into`].
    pub fn elements_into(&self, out: &mut [u8]) -> Result<(), EncodingError> {
        if self.bytes != out.len() as u64 || out.is_empty() {
            return Err(EncodingError::Length { expected: out.len(), found: self.bytes });
        }
        let sized = |body: &[u8], expected: usize| {
            if body.len() == expected { Ok(()) } else { Err(EncodingError::Body { expected, found: body.len() }) }
        };
        match (self.encoding.form, self.encoding.planes) {
            (Form::Constant, _) => {
                sized(self.body, width_of(self.dtype))?;
                repeat(self.body, out);
            }
            (Form::Plain, false) => {
                sized(self.body, out.len())?;
                out.copy_from_slice(self.body);
            }
            (Form::Plain, true) => planes::decompress(self.dtype, self.body, out)?,
            (Form::Narrow(narrow), false) => {
                sized(self.body, out.len() / 2)?;
                narrow.widen(self.body, out);
            }
            (Form::Narrow(narrow), true) => {
                let mut elements = vec![0; out.len() / 2];
                planes::decompress(narrow.dtype(), self.body, &mut elements)?;
                narrow.widen(&elements, out);
            }
        }
        Ok(())
    }
}

/// Bytes of one element; of types that are packed, a byte of them.
fn width_of(dtype: DType) -> usize {
    dtype.byte_width().unwrap_or(1)
}

/// Fills `out`, a whole number of elements, with copies of one.
fn repeat(element: &[u8], out: &mut [u8]) {
    let width = element.len();
    out[..width].copy_from_slice(element);
    let mut done = width;
    while done < out.len() {
        let more = done.min(out.len() - done);
        out.copy_within(..more, done);
        done += more;
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
