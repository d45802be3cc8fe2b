//! The wire format of Protocol Buffers, as much as ONNX needs of it.
//!
//! Responsible for: reading the fields of a message without copying them ([`Fields`]), and writing a message that is
//! mostly made of pieces of another one ([`Rope`]).
//!
//! Invariants:
//! - a reader never looks past the end of its message, and never allocates;
//! - what a rope takes from its source it writes byte for byte; lengths of rewritten messages are written canonically.
//!
//! Source: "Encoding" in the documentation of Protocol Buffers. Groups (wire types 3 and 4) do not occur in ONNX and
//! are refused.

use std::ops::Range;

/// Why bytes are no protobuf message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WireError {
    /// A field reaches past the end of its message. `declared` is its length, where it has one.
    Overrun { at: usize, number: Option<u32>, declared: Option<u64> },
    /// A varint of more than 64 bits, a field number of 0 or above 2^29, or an unknown wire type.
    Malformed { at: usize },
}

/// The value of a field. `Bytes` is a range of the reader's buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(Range<usize>),
}

/// One field of a message. `span` covers its key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    pub number: u32,
    pub value: Value,
    pub span: Range<usize>,
}

/// Reads the fields of the message that is `span` of `buffer`. After an error it ends.
pub(super) struct Fields<'a> {
    buffer: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    /// `span` lies within `buffer`.
    pub fn new(buffer: &'a [u8], span: Range<usize>) -> Fields<'a> {
        Fields { buffer: &buffer[..span.end], at: span.start }
    }

    fn field(&mut self) -> Result<Field, WireError> {
        let start = self.at;
        let key = read_varint(self.buffer, &mut self.at)?;
        let malformed = WireError::Malformed { at: start };
        let number = u32::try_from(key >> 3).map_err(|_| malformed)?;
        if number == 0 || number >= 1 << 29 {
            return Err(malformed);
        }
        let overrun = |declared| WireError::Overrun { at: start, number: Some(number), declared };
        let value = match key & 7 {
            0 => Value::Varint(read_varint(self.buffer, &mut self.at).map_err(|error| match error {
                WireError::Overrun { .. } => overrun(None),
                other => other,
            })?),
            1 => Value::Fixed64(u64::from_le_bytes(self.array().ok_or(overrun(None))?)),
            2 => {
                let declared = read_varint(self.buffer, &mut self.at).map_err(|error| match error {
                    WireError::Overrun { .. } => overrun(None),
                    other => other,
                })?;
                let left = self.buffer.len() - self.at;
                let len = usize::try_from(declared).ok().filter(|&len| len <= left).ok_or(overrun(Some(declared)))?;
                let from = self.at;
                self.at += len;
                Value::Bytes(from..self.at)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.array().ok_or(overrun(None))?)),
            _ => return Err(malformed),
        };
        Ok(Field { number, value, span: start..self.at })
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let array = *self.buffer[self.at..].first_chunk::<N>()?;
        self.at += N;
        Some(array)
    }
}

impl Iterator for Fields<'_> {
    type Item = Result<Field, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.buffer.len() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.at = self.buffer.len();
        }
        Some(field)
    }
}

/// Reads the varint at `*at` and moves `*at` behind it.
pub(super) fn read_varint(buffer: &[u8], at: &mut usize) -> Result<u64, WireError> {
    let start = *at;
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let Some(&byte) = buffer.get(*at) else {
            return Err(WireError::Overrun { at: start, number: None, declared: None });
        };
        *at += 1;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            break;
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(WireError::Malformed { at: start })
}

/// Appends `value` as a varint.
pub(super) fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Bytes of `value` as a varint.
pub(super) fn varint_len(value: u64) -> u64 {
    u64::from((64 - (value | 1).leading_zeros()).div_ceil(7))
}

/// Appends the key of a length-delimited field.
pub(super) fn write_bytes_key(out: &mut Vec<u8>, number: u32) {
    write_varint(out, u64::from(number) << 3 | 2);
}

/// Appends a length-delimited field.
pub(super) fn write_bytes(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    write_bytes_key(out, number);
    write_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// One piece of a rope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// A range of the source.
    Source(Range<usize>),
    /// A range of the rope's own bytes.
    Own(Range<usize>),
    /// The length of the message that follows, as a varint.
    Length(u64),
    /// The bytes of a stored tensor.
    Tensor { ordinal: u32, len: u64 },
}

/// A message under construction, as a list of pieces; the length of a nested message is known when it is closed.
#[derive(Default)]
pub(super) struct Rope {
    pub pieces: Vec<Piece>,
    pub own: Vec<u8>,
    /// Bytes of the innermost open message so far.
    len: u64,
    /// For each open message: the place of its length among the pieces, and the bytes of its parent so far.
    open: Vec<(usize, u64)>,
}

/// A state of a rope to which it can be taken back.
pub(super) struct Mark {
    pieces: usize,
    last: Option<Piece>,
    own: usize,
    open: usize,
    len: u64,
}

impl Rope {
    /// Appends a range of the source; consecutive ranges become one piece.
    pub fn source(&mut self, span: Range<usize>) {
        if span.is_empty() {
            return;
        }
        self.len += span.len() as u64;
        match self.pieces.last_mut() {
            Some(Piece::Source(last)) if last.end == span.start => last.end = span.end,
            _ => self.pieces.push(Piece::Source(span)),
        }
    }

    /// Appends what `write` puts at the end of the vector it is given.
    pub fn own(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.own.len();
        write(&mut self.own);
        let end = self.own.len();
        self.len += (end - start) as u64;
        match self.pieces.last_mut() {
            Some(Piece::Own(last)) if last.end == start => last.end = end,
            _ => self.pieces.push(Piece::Own(start..end)),
        }
    }

    /// Appends a field `number` with the bytes of a stored tensor.
    pub fn tensor(&mut self, number: u32, ordinal: u32, len: u64) {
        self.own(|own| {
            write_bytes_key(own, number);
            write_varint(own, len);
        });
        self.len += len;
        self.pieces.push(Piece::Tensor { ordinal, len });
    }

    /// Opens a nested message as field `number`.
    pub fn begin(&mut self, number: u32) {
        self.own(|own| write_bytes_key(own, number));
        self.open.push((self.pieces.len(), self.len));
        self.pieces.push(Piece::Length(0));
        self.len = 0;
    }

    /// Closes the innermost open message.
    pub fn end(&mut self) {
        if let Some((place, parent)) = self.open.pop() {
            self.pieces[place] = Piece::Length(self.len);
            self.len += parent + varint_len(self.len);
        }
    }

    /// The present state.
    pub fn mark(&self) -> Mark {
        Mark {
            pieces: self.pieces.len(),
            last: self.pieces.last().cloned(),
            own: self.own.len(),
            open: self.open.len(),
            len: self.len,
        }
    }

    /// Undoes everything since `mark`, messages opened since then included.
    pub fn rollback(&mut self, mark: Mark) {
        self.pieces.truncate(mark.pieces);
        if let (Some(place), Some(last)) = (self.pieces.last_mut(), mark.last) {
            *place = last;
        }
        self.own.truncate(mark.own);
        self.open.truncate(mark.open);
        self.len = mark.len;
    }

    /// Bytes of the whole message. All nested messages are closed.
    pub fn len(&self) -> u64 {
        debug_assert!(self.open.is_empty());
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(bytes: &[u8]) -> Result<Vec<Field>, WireError> {
        Fields::new(bytes, 0..bytes.len()).collect()
    }

    #[test]
    fn varints_are_read_back() {
        for value in [0, 1, 127, 128, 16_383, 16_384, u64::from(u32::MAX), u64::MAX >> 1, u64::MAX] {
            let mut bytes = Vec::new();
            write_varint(&mut bytes, value);
            assert_eq!(bytes.len() as u64, varint_len(value));
            let mut at = 0;
            assert_eq!(read_varint(&bytes, &mut at), Ok(value));
            assert_eq!(at, bytes.len());
            bytes.pop();
            assert!(matches!(read_varint(&bytes, &mut 0), Err(WireError::Overrun { .. })));
        }
        assert_eq!(read_varint(&[0xff; 11], &mut 0), Err(WireError::Malformed { at: 0 }));
        assert_eq!(
            read_varint(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2], &mut 0),
            Err(WireError::Malformed { at: 0 })
        );
    }

    #[test]
    fn fields_of_every_wire_type() {
        // Varint 1: 150; fixed64 2; bytes 3: "ab"; fixed32 4.
        let bytes = [8, 0x96, 1, 0x11, 1, 0, 0, 0, 0, 0, 0, 0, 0x1a, 2, b'a', b'b', 0x25, 7, 0, 0, 0];
        let expected = [
            Field { number: 1, value: Value::Varint(150), span: 0..3 },
            Field { number: 2, value: Value::Fixed64(1), span: 3..12 },
            Field { number: 3, value: Value::Bytes(14..16), span: 12..16 },
            Field { number: 4, value: Value::Fixed32(7), span: 16..21 },
        ];
        assert_eq!(fields(&bytes).unwrap(), expected);
        assert_eq!(fields(&[]).unwrap(), []);
    }

    #[test]
    fn refuses_malformed_fields() {
        let overrun = |number, declared| Err(WireError::Overrun { at: 0, number: Some(number), declared });
        assert_eq!(fields(&[0x1a, 3, 1, 2]), overrun(3, Some(3)));
        assert_eq!(
            fields(&[0x1a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]),
            overrun(3, Some(u64::MAX))
        );
        assert_eq!(fields(&[0x11, 1]), overrun(2, None));
        assert_eq!(fields(&[0x25, 1, 2, 3]), overrun(4, None));
        assert_eq!(fields(&[0x08]), overrun(1, None));
        for key in [0u8, 2, 0x0b, 0x0c, 0x0e, 0x0f] {
            assert_eq!(fields(&[key, 1, 1]), Err(WireError::Malformed { at: 0 }));
        }
        assert_eq!(fields(&[0x80, 0x80, 0x80, 0x80, 0x10, 0]), Err(WireError::Malformed { at: 0 }));
    }

    #[test]
    fn a_rope_knows_lengths_and_goes_back() {
        let mut rope = Rope::default();
        rope.source(0..2);
        let mark = rope.mark();
        rope.source(2..3);
        rope.begin(1);
        rope.own(|own| own.push(9));
        rope.rollback(mark);
        rope.begin(1);
        rope.begin(2);
        rope.source(2..5);
        rope.source(5..6);
        rope.tensor(9, 3, 300);
        rope.end();
        rope.end();
        let expected = [
            Piece::Source(0..2),
            Piece::Own(0..1),
            Piece::Length(310),
            Piece::Own(1..2),
            Piece::Length(307),
            Piece::Source(2..6),
            Piece::Own(2..5),
            Piece::Tensor { ordinal: 3, len: 300 },
        ];
        assert_eq!(rope.pieces, expected);
        assert_eq!(rope.len(), 2 + 1 + 2 + 310);
    }
}
