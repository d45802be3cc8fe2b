//! Variable-length values as the access method meets them: plain, short, compressed, TOAST pointers, stand-ins.
//!
//! A *stand-in* is what a stored row holds in place of a value that lies in the block store. It has the header of a
//! compressed varlena with the unused compression method 3, so that heapam passes over it (16 bytes are below what its
//! toaster considers), and so that one that leaked raw raises "invalid compression method id 3":
//!
//! ```text
//!  0        4                 8           12                16
//!  +--------+-----------------+-----------+------------------+
//!  | header | raw size | 3<<30 | block id  | stored | method  |
//!  +--------+-----------------+-----------+------------------+
//! ```
//! The last word is what a TOAST pointer calls `va_extinfo`: stored bytes, and the compression method of the payload.

use pgrx::pg_sys;

/// Bytes of a varlena's four-byte header.
pub const VARHDRSZ: usize = 4;
/// Bytes of a stand-in.
pub const STAND_IN_BYTES: usize = 16;
/// Values up to this size stay in the row: heapam's toaster never moves them (`MAXALIGN(TOAST_POINTER_SIZE)`).
pub const INLINE_BYTES: usize = 24;
/// Bytes of a TOAST pointer: two of header, sixteen of `varatt_external`.
pub const TOAST_POINTER_BYTES: usize = 2 + std::mem::size_of::<pg_sys::varatt_external>();

const STAND_IN_METHOD: u32 = 3;
const SIZE_MASK: u32 = (1 << 30) - 1;

const _: () = assert!(STAND_IN_BYTES <= INLINE_BYTES && TOAST_POINTER_BYTES == 18);

/// A reference to a payload of a block store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandIn {
    /// Bytes of the value without its header, decompressed.
    pub raw_len: u32,
    /// The block's number in the store.
    pub block_id: u32,
    /// As `va_extinfo`: stored bytes in the low 30 bits, compression method above.
    pub ext_info: u32,
}

impl StandIn {
    /// Stored bytes of the payload.
    pub fn stored_len(&self) -> u32 {
        self.ext_info & SIZE_MASK
    }

    /// The form that a row holds.
    pub fn to_bytes(self) -> [u8; STAND_IN_BYTES] {
        let mut out = [0u8; STAND_IN_BYTES];
        // SET_VARSIZE_COMPRESSED on a little-endian machine: length << 2 with the low bits 10.
        out[0..4].copy_from_slice(&(((STAND_IN_BYTES as u32) << 2) | 0x02).to_ne_bytes());
        out[4..8].copy_from_slice(&(self.raw_len & SIZE_MASK | STAND_IN_METHOD << 30).to_ne_bytes());
        out[8..12].copy_from_slice(&self.block_id.to_ne_bytes());
        out[12..16].copy_from_slice(&self.ext_info.to_ne_bytes());
        out
    }

    /// Reads the value at `datum` if it is a stand-in.
    ///
    /// # Safety
    /// `datum` points at a varlena.
    pub unsafe fn read(datum: *const pg_sys::varlena) -> Option<StandIn> {
        // SAFETY: by the contract; a compressed varlena has at least eight bytes, and a stand-in sixteen, which its
        // own length proves before they are read. Unaligned reads, since a type's alignment may be less than int.
        unsafe {
            if !pgrx::varatt_is_4b_c(datum) {
                return None;
            }
            let p = datum.cast::<u8>();
            let word = |at: usize| p.add(at).cast::<u32>().read_unaligned();
            let info = word(4);
            if info >> 30 != STAND_IN_METHOD || pgrx::varsize_4b(datum) != STAND_IN_BYTES {
                return None;
            }
            Some(StandIn { raw_len: info & SIZE_MASK, block_id: word(8), ext_info: word(12) })
        }
    }

    /// The on-disk TOAST pointer by which every reader outside the access method reaches the payload.
    pub fn to_toast_pointer(self, store: pg_sys::Oid) -> [u8; TOAST_POINTER_BYTES] {
        let mut out = [0u8; TOAST_POINTER_BYTES];
        out[0] = 0x01; // VARATT_IS_1B_E on a little-endian machine
        out[1] = pg_sys::vartag_external::VARTAG_ONDISK as u8;
        out[2..6].copy_from_slice(&(self.raw_len + VARHDRSZ as u32).to_ne_bytes());
        out[6..10].copy_from_slice(&self.ext_info.to_ne_bytes());
        out[10..14].copy_from_slice(&self.block_id.to_ne_bytes());
        out[14..18].copy_from_slice(&store.to_u32().to_ne_bytes());
        out
    }
}

/// The TOAST pointer at `datum`, if it is an on-disk one: `(stand-in of the same content, store)`.
///
/// # Safety
/// `datum` points at a varlena.
pub unsafe fn toast_pointer(datum: *const pg_sys::varlena) -> Option<(StandIn, pg_sys::Oid)> {
    // SAFETY: by the contract; an on-disk pointer has eighteen bytes, read unaligned.
    unsafe {
        if !pgrx::varatt_is_1b_e(datum) || u32::from(pgrx::vartag_1b_e(datum)) != pg_sys::vartag_external::VARTAG_ONDISK
        {
            return None;
        }
        let p = datum.cast::<u8>();
        let word = |at: usize| p.add(at).cast::<u32>().read_unaligned();
        let raw = word(2);
        let stand_in = StandIn { raw_len: raw.wrapping_sub(VARHDRSZ as u32), ext_info: word(6), block_id: word(10) };
        Some((stand_in, pg_sys::Oid::from_u32(word(14))))
    }
}

/// True for a TOAST pointer of any kind (on disk, in memory, expanded).
///
/// # Safety
/// `datum` points at a varlena.
pub unsafe fn is_external(datum: *const pg_sys::varlena) -> bool {
    // SAFETY: by the contract.
    unsafe { pgrx::varatt_is_1b_e(datum) }
}

/// True for a value that is stored compressed in the row.
///
/// # Safety
/// `datum` points at a varlena.
pub unsafe fn is_compressed(datum: *const pg_sys::varlena) -> bool {
    // SAFETY: by the contract.
    unsafe { pgrx::varatt_is_4b_c(datum) }
}

/// Bytes that the value takes in a row as it is.
///
/// # Safety
/// `datum` points at a varlena.
pub unsafe fn size_in_row(datum: *const pg_sys::varlena) -> usize {
    // SAFETY: by the contract.
    unsafe { pgrx::varsize_any(datum) }
}

/// The bytes behind the header of a plain or compressed value with a four-byte or one-byte header.
///
/// # Safety
/// `datum` points at a varlena that is no TOAST pointer and outlives the result.
pub unsafe fn payload<'a>(datum: *const pg_sys::varlena) -> &'a [u8] {
    // SAFETY: by the contract.
    unsafe {
        let len = pgrx::varsize_any_exhdr(datum);
        std::slice::from_raw_parts(pgrx::vardata_any(datum).cast(), len)
    }
}

/// The plain bytes of a compressed value, of which `stored` is what follows the four-byte header. `Err` says why it cannot
/// be decompressed.
pub fn decompress(stored: &[u8], raw_len: u32) -> Result<Vec<u8>, String> {
    let word = stored.get(..4).map(|w| u32::from_ne_bytes(w.try_into().expect("four bytes"))).unwrap_or(0);
    if word & SIZE_MASK != raw_len || word >> 30 == STAND_IN_METHOD {
        return Err("the word of raw size and compression method is wrong".into());
    }
    let mut datum = Vec::with_capacity(VARHDRSZ + stored.len() + 8);
    datum.extend_from_slice(&((((VARHDRSZ + stored.len()) as u32) << 2) | 0x02).to_ne_bytes());
    datum.extend_from_slice(stored);
    pgrx::PgTryBuilder::new(std::panic::AssertUnwindSafe(|| {
        // SAFETY: a compressed varlena; decompression checks every read and write, and raises an ERROR that holds nothing
        // but memory, so it is caught here.
        unsafe {
            let plain = pg_sys::detoast_attr(datum.as_mut_ptr().cast());
            let bytes = payload(plain).to_vec();
            pg_sys::pfree(plain.cast());
            Ok(bytes)
        }
    }))
    .catch_others(|_| Err("the compressed data is corrupt".into()))
    .execute()
}

/// Calls `f` with the detoasted bytes of a varlena.
///
/// # Safety
/// `datum` points at a varlena; a copy is made in the current memory context if it has to be.
pub unsafe fn with_bytes<T>(datum: pg_sys::Datum, f: impl FnOnce(&[u8]) -> T) -> T {
    // SAFETY: by the contract.
    unsafe { f(payload(pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr()))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stand_in_reads_back() {
        let s = StandIn { raw_len: 65544, block_id: 7, ext_info: 65544 };
        let bytes = s.to_bytes();
        // SAFETY: the bytes are a varlena.
        assert_eq!(unsafe { StandIn::read(bytes.as_ptr().cast()) }, Some(s));
    }

    #[test]
    fn a_compressed_value_of_another_method_is_no_stand_in() {
        let mut bytes = StandIn { raw_len: 100, block_id: 7, ext_info: 9 }.to_bytes();
        bytes[7] &= 0x3f; // method 0: pglz
        // SAFETY: the bytes are a varlena.
        assert_eq!(unsafe { StandIn::read(bytes.as_ptr().cast()) }, None);
    }

    #[test]
    fn a_toast_pointer_carries_the_same_reference() {
        let s = StandIn { raw_len: 1000, block_id: 42, ext_info: 500 | 1 << 30 };
        let pointer = s.to_toast_pointer(pg_sys::Oid::from_u32(16400));
        // SAFETY: the bytes are a varlena.
        let read = unsafe { toast_pointer(pointer.as_ptr().cast()) };
        assert_eq!(read, Some((s, pg_sys::Oid::from_u32(16400))));
    }
}
