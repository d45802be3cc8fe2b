//! What of a row goes to the block store, and the row that is left.
//!
//! In place of heapam's toaster (heaptoast.c): `tensor_block` values above 24 bytes always go to the store, so that equal
//! blocks are stored once whatever the row's width; other values, largest first, while the row is above heap's threshold.
//! After that heapam's own toaster finds nothing to do: what is left above 24 bytes has storage PLAIN.

use crate::pg::interrupt;
use crate::pg::relation::OpenRelation;
use crate::pg::tuple::attribute;
use crate::pg::varlena::{self, INLINE_BYTES, StandIn, VARHDRSZ};
use crate::store::{self, Hash, Payload, Store};
use pgrx::pg_sys;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use tensor_blocks::Block;
use tensor_blocks::encoding::{self, Encoding};

/// `TOAST_TUPLE_THRESHOLD` of 8 kB pages (heaptoast.h): a quarter of a page.
const ROW_THRESHOLD: usize = 2032;
/// `SizeofHeapTupleHeader`.
const ROW_HEADER: usize = std::mem::offset_of!(pg_sys::HeapTupleHeaderData, t_bits);

/// Turns rows of one table into the form in which they are stored.
pub struct Toaster {
    rel: pg_sys::Relation,
    desc: pg_sys::TupleDesc,
    block_type: pg_sys::Oid,
    store: Option<Store>,
    /// Another block store out of which values come.
    other: Option<OpenRelation>,
}

impl Toaster {
    /// A toaster for rows of the open table `rel`.
    pub fn new(rel: pg_sys::Relation) -> Toaster {
        // SAFETY: `rel` is open; the handler of its access method lives in the extension's schema.
        let (desc, block_type) = unsafe { ((*rel).rd_att, block_type_beside((*rel).rd_amhandler)) };
        Toaster { rel, desc, block_type, store: None, other: None }
    }

    /// Forms the row of `values` and `isnull`, with stand-ins for what went to the store. Allocates in the current memory
    /// context, which the caller empties.
    ///
    /// # Safety
    /// The arrays have a valid value for each column of the table's descriptor.
    pub unsafe fn form(&mut self, values: *const pg_sys::Datum, isnull: *const bool) -> pg_sys::HeapTuple {
        // SAFETY: by the contract.
        unsafe { self.form_all(&[(values, isnull)])[0] }
    }

    /// As [`Toaster::form`], of many rows: their blocks are stored together.
    ///
    /// # Safety
    /// As there, for each pair of arrays.
    pub unsafe fn form_all(&mut self, rows: &[(*const pg_sys::Datum, *const bool)]) -> Vec<pg_sys::HeapTuple> {
        // SAFETY: by the contract; each non-null varlena column's datum points at a varlena.
        unsafe {
            let (desc, natts) = (self.desc, (*self.desc).natts as usize);
            let mut formed: Vec<Row<'_>> = Vec::with_capacity(rows.len());
            let mut leaving = Vec::new();
            for (number, &(values, isnull)) in rows.iter().enumerate() {
                let values = std::slice::from_raw_parts(values, natts).to_vec();
                let mut row = Row { values, isnull: std::slice::from_raw_parts(isnull, natts) };
                for i in (0..natts).filter(|&i| is_varlena(desc, row.isnull, i)) {
                    interrupt::check();
                    let datum = row.values[i].cast_mut_ptr::<pg_sys::varlena>();
                    if varlena::is_external(datum) {
                        row.values[i] = self.take_in(datum);
                    }
                    let att = attribute(desc, i);
                    if (*att).atttypid == self.block_type && leaves_last(att).is_some() {
                        let value = self.leaving(row.values[i], att);
                        leaving.extend(value.map(|value| (number, i, value)));
                    }
                }
                formed.push(row);
            }
            if let Some(store) = self.store.as_ref().filter(|_| !leaving.is_empty()) {
                let contents: Vec<_> = leaving.iter().map(|(_, _, value)| value.content()).collect();
                let stand_ins = store.put_all(&contents, |i| leaving[i].2.payload());
                for ((row, column, _), stand_in) in leaving.iter().zip(stand_ins) {
                    formed[*row].values[*column] = copy_to_context(&stand_in.to_bytes());
                }
            }
            formed.into_iter().map(|row| self.finish(row)).collect()
        }
    }

    /// Moves further values to the store while the row is too wide, and forms it.
    unsafe fn finish(&mut self, row: Row<'_>) -> pg_sys::HeapTuple {
        // SAFETY: the row has a valid value for each column, and no TOAST pointer that `take_in` has not seen.
        unsafe {
            let Row { mut values, isnull } = row;
            let (desc, natts) = (self.desc, values.len());
            // Others by size: first those with storage EXTENDED and EXTERNAL, then MAIN.
            let wide = self.row_bytes(&mut values, isnull) > ROW_THRESHOLD;
            let target = self.row_target();
            for main in [false, true].into_iter().filter(|_| wide) {
                while self.row_bytes(&mut values, isnull) > target {
                    let widest = (0..natts)
                        .filter(|&i| is_varlena(desc, isnull, i) && leaves_last(attribute(desc, i)) == Some(main))
                        .map(|i| (varlena::size_in_row(values[i].cast_mut_ptr()), i))
                        .max();
                    let Some((size, i)) = widest else { break };
                    if size <= INLINE_BYTES || self.store().is_none() {
                        break;
                    }
                    values[i] = self.move_out(values[i], attribute(desc, i));
                }
            }

            let mut isnull = isnull.to_vec();
            let tuple = pg_sys::heap_form_tuple(self.desc, values.as_mut_ptr(), isnull.as_mut_ptr());
            (*tuple).t_tableOid = (*self.rel).rd_id;
            tuple
        }
    }

    /// A TOAST pointer as it may stand in a row of this table: a stand-in if its payload is in this table's store
    /// already, also if it points to the same content in another one, which is then not read; else the value itself.
    unsafe fn take_in(&mut self, datum: *mut pg_sys::varlena) -> pg_sys::Datum {
        // SAFETY: `datum` is a TOAST pointer of some kind.
        unsafe {
            if let Some((reference, store)) = varlena::toast_pointer(datum)
                && self.store().is_some()
            {
                let found = if store == (*(*self.rel).rd_rel).reltoastrelid {
                    self.store().filter(|s| s.holds(&reference)).map(|_| reference)
                } else {
                    self.like_in(store, &reference)
                };
                if let Some(found) = found {
                    return copy_to_context(&found.to_bytes());
                }
            }
            pg_sys::Datum::from(pg_sys::detoast_external_attr(datum))
        }
    }

    /// The block of this table's store with the content of a block of the TOAST relation `oid`, if that is a block store.
    unsafe fn like_in(&mut self, oid: pg_sys::Oid, reference: &StandIn) -> Option<StandIn> {
        // SAFETY: open relations.
        unsafe {
            if self.other.as_ref().is_none_or(|other| (*other.raw()).rd_id != oid) {
                self.other = Some(OpenRelation::table(oid, pg_sys::AccessShareLock));
            }
            let other = self.other.as_ref()?.raw();
            if (*other).rd_amhandler != (*self.rel).rd_amhandler {
                return None;
            }
            self.store.as_ref()?.find_like(other, reference)
        }
    }

    /// Moves a value to the store and returns its stand-in. Values that do not leave the row stay as they are.
    unsafe fn move_out(&mut self, value: pg_sys::Datum, att: *const pg_sys::FormData_pg_attribute) -> pg_sys::Datum {
        // SAFETY: as for `leaving`.
        unsafe {
            let Some(leaving) = self.leaving(value, att) else { return value };
            let Some(store) = &self.store else { return value };
            let stand_ins = store.put_all(&[leaving.content()], |_| leaving.payload());
            copy_to_context(&stand_ins[0].to_bytes())
        }
    }

    /// A value that is to leave its row, with its content's hash. None for values up to 24 bytes, and for tables without a store.
    unsafe fn leaving<'a>(
        &mut self,
        value: pg_sys::Datum,
        att: *const pg_sys::FormData_pg_attribute,
    ) -> Option<Leaving<'a>> {
        // SAFETY: `value` points at a varlena that is no TOAST pointer (`take_in` saw to that), and `att` describes it.
        unsafe {
            let datum = value.cast_mut_ptr::<pg_sys::varlena>();
            if varlena::size_in_row(datum) <= INLINE_BYTES || StandIn::read(datum).is_some() {
                return None;
            }
            self.store()?;
            // The hash is of the decompressed bytes, so that equal values meet whatever form they come in.
            let plain = pg_sys::detoast_attr(datum);
            let raw = varlena::payload(plain);
            let block = Block::decode(raw).ok().filter(|_| (*att).atttypid == self.block_type);
            let hash = match &block {
                Some(block) => known_hash(datum).filter(|_| plain == datum).unwrap_or_else(|| block.hash().0),
                None => store::value_hash(raw),
            };
            Some(Leaving { datum, plain, raw, hash, is_block: block.is_some(), att })
        }
    }

    /// Bytes that a wide row is to be brought down to: the table's `toast_tuple_target`.
    fn row_target(&self) -> usize {
        // SAFETY: open relation; options of a table are StdRdOptions.
        unsafe {
            let options = (*self.rel).rd_options.cast::<pg_sys::StdRdOptions>();
            if options.is_null() { ROW_THRESHOLD } else { (*options).toast_tuple_target as usize }
        }
    }

    /// Bytes of the row that the values would make.
    unsafe fn row_bytes(&self, values: &mut [pg_sys::Datum], isnull: &[bool]) -> usize {
        // SAFETY: the arrays have a valid value for each column.
        unsafe {
            let bitmap = if isnull.contains(&true) { isnull.len().div_ceil(8) } else { 0 };
            let header = (ROW_HEADER + bitmap).next_multiple_of(8);
            header + pg_sys::heap_compute_data_size(self.desc, values.as_mut_ptr(), isnull.as_ptr().cast_mut())
        }
    }

    fn store(&mut self) -> Option<&Store> {
        if self.store.is_none() {
            // SAFETY: open relation.
            let oid = unsafe { (*(*self.rel).rd_rel).reltoastrelid };
            if oid == pg_sys::InvalidOid {
                return None;
            }
            self.store = Some(Store::open_for_write(oid));
        }
        self.store.as_ref()
    }
}

thread_local! {
    /// Hashes of blocks that are being inserted, by where they lie.
    static HASHES: RefCell<HashMap<usize, Hash>> = RefCell::new(HashMap::new());
}

/// Runs `f`, which inserts rows, with the hashes of tensor blocks in them that are known already, so that they are not computed again.
///
/// # Safety
/// Each datum is a plain `tensor_block` with this hash, and stays so while `f` runs.
pub unsafe fn with_hashes<T>(hashes: Vec<(pg_sys::Datum, Hash)>, f: impl FnOnce() -> T) -> T {
    /// Forgets them, also while unwinding.
    struct Known;
    impl Drop for Known {
        fn drop(&mut self) {
            HASHES.with_borrow_mut(HashMap::clear);
        }
    }
    let _known = Known;
    HASHES.with_borrow_mut(|known| known.extend(hashes.into_iter().map(|(datum, hash)| (datum.value(), hash))));
    f()
}

fn known_hash(datum: *const pg_sys::varlena) -> Option<Hash> {
    HASHES.with_borrow(|known| known.get(&datum.addr()).copied())
}

/// A row on its way: its values as they are now.
struct Row<'a> {
    values: Vec<pg_sys::Datum>,
    isnull: &'a [bool],
}

/// A value that is to leave its row.
struct Leaving<'a> {
    datum: *mut pg_sys::varlena,
    /// Its decompressed form.
    plain: *mut pg_sys::varlena,
    raw: &'a [u8],
    hash: Hash,
    is_block: bool,
    att: *const pg_sys::FormData_pg_attribute,
}

impl<'a> Leaving<'a> {
    fn content(&self) -> (Hash, u32) {
        (self.hash, self.raw.len() as u32)
    }

    /// The form in which it goes to the store.
    unsafe fn payload(&self) -> Payload<'a> {
        let small = if self.is_block { encoding::encode(self.raw, store::settings::compression()) } else { None };
        match small {
            Some((encoding, stored)) => Payload { stored: Cow::Owned(stored), method: 0, encoding },
            // SAFETY: the caller's: values and the table's descriptor are there as long as the row is being formed.
            None => unsafe { payload_of(self.datum, self.plain, self.raw, self.att) },
        }
    }
}

/// True if column `i` has a value of variable length.
unsafe fn is_varlena(desc: pg_sys::TupleDesc, isnull: &[bool], i: usize) -> bool {
    // SAFETY: the descriptor has this column.
    unsafe {
        let att = attribute(desc, i);
        !isnull[i] && (*att).attlen == -1 && !(*att).attisdropped
    }
}

/// The form in which a value without a small one goes to the store: compressed where its storage asks for it and it pays, else as it is.
unsafe fn payload_of<'a>(
    datum: *mut pg_sys::varlena,
    plain: *mut pg_sys::varlena,
    raw: &'a [u8],
    att: *const pg_sys::FormData_pg_attribute,
) -> Payload<'a> {
    // SAFETY: `plain` is the decompressed form of `datum`, `raw` its bytes, `att` the column's description.
    unsafe {
        if (*att).attstorage != pg_sys::TYPSTORAGE_EXTERNAL as std::ffi::c_char {
            let compressed = if varlena::is_compressed(datum) {
                datum
            } else {
                pg_sys::ffi::pg_guard_ffi_boundary(|| {
                    toast_compress_datum(pg_sys::Datum::from(plain), (*att).attcompression)
                })
                .cast_mut_ptr()
            };
            if !compressed.is_null() {
                // Behind the four-byte header: the word with raw size and method, then the data. So does core TOAST.
                let len = varlena::size_in_row(compressed) - VARHDRSZ;
                let bytes = std::slice::from_raw_parts(compressed.cast::<u8>().add(VARHDRSZ), len);
                let info = u32::from_ne_bytes(bytes[..4].try_into().expect("a compressed value has this word"));
                if len < raw.len() {
                    return Payload { stored: Cow::Borrowed(bytes), method: info >> 30, encoding: Encoding::PLAIN };
                }
            }
        }
        Payload { stored: Cow::Borrowed(raw), method: 0, encoding: Encoding::PLAIN }
    }
}

/// Storage of a column whose values may leave the row: `Some(true)` for MAIN, which leave last, `None` for PLAIN.
unsafe fn leaves_last(att: *const pg_sys::FormData_pg_attribute) -> Option<bool> {
    // SAFETY: `att` describes a column.
    match unsafe { (*att).attstorage } as u8 {
        pg_sys::TYPSTORAGE_PLAIN => None,
        pg_sys::TYPSTORAGE_MAIN => Some(true),
        _ => Some(false),
    }
}

/// A copy in the current memory context, as a datum.
fn copy_to_context(bytes: &[u8]) -> pg_sys::Datum {
    // SAFETY: palloc raises an ERROR rather than return null; the copy fits.
    unsafe {
        let copy = pg_sys::palloc(bytes.len()).cast::<u8>();
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy, bytes.len());
        pg_sys::Datum::from(copy)
    }
}

/// The type `tensor_block` in the schema of the access method's handler; invalid if it is not there (yet).
unsafe fn block_type_beside(handler: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: syscache look-ups in a transaction.
    unsafe {
        let schema = pg_sys::get_func_namespace(handler);
        pg_sys::GetSysCacheOid(
            pg_sys::SysCacheIdentifier::TYPENAMENSP as i32,
            pg_sys::Anum_pg_type_oid as i16,
            pg_sys::Datum::from(c"tensor_block".as_ptr()),
            pg_sys::Datum::from(schema),
            pg_sys::Datum::from(0),
            pg_sys::Datum::from(0),
        )
    }
}

unsafe extern "C-unwind" {
    // access/toast_internals.h, for which there is no binding. Returns 0 where compression does not pay.
    fn toast_compress_datum(value: pg_sys::Datum, method: std::ffi::c_char) -> pg_sys::Datum;
}
