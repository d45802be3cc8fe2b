//! Blocks in small forms: the way back to their bytes.

use super::format::Locator;
use tensor_blocks::encoding::Encoded;

/// Fills `out` with bytes `offset ..` of the value whose small form is `stored`. `Err` says what is wrong with that form.
///
/// A slice is made of the whole value. What is asked for most, all of it or all of its elements, is made where it is wanted.
pub fn slice(locator: &Locator, stored: &[u8], offset: usize, out: &mut [u8]) -> Result<(), String> {
    let encoded = open(locator, stored)?;
    let result = if offset == 0 && out.len() == locator.raw_len as usize {
        encoded.value_into(out)
    } else if offset == encoded.head_len() && offset + out.len() == locator.raw_len as usize {
        encoded.elements_into(out)
    } else {
        let value = whole(&encoded)?;
        let wanted = value.get(offset..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(wanted.ok_or("The slice lies outside of the value.")?);
        Ok(())
    };
    result.map_err(|e| format!("{e}."))
}

/// The value whose small form is `stored`.
pub fn value(locator: &Locator, stored: &[u8]) -> Result<Vec<u8>, String> {
    whole(&open(locator, stored)?)
}

/// The small form, if its head tells of a value as long as the locator says.
fn open<'a>(locator: &Locator, stored: &'a [u8]) -> Result<Encoded<'a>, String> {
    let encoding = locator.encoding().ok_or_else(|| format!("Form {} is not known.", locator.encoding))?;
    let encoded = Encoded::open(encoding, stored).map_err(|e| format!("{e}."))?;
    if encoded.value_len() != u64::from(locator.raw_len) {
        return Err(format!("It is of {} bytes where {} are expected.", encoded.value_len(), locator.raw_len));
    }
    Ok(encoded)
}

fn whole(encoded: &Encoded<'_>) -> Result<Vec<u8>, String> {
    let mut value = Vec::new();
    let len = encoded.value_len() as usize;
    value.try_reserve_exact(len).map_err(|_| format!("There is no memory for its {len} bytes."))?;
    value.resize(len, 0);
    encoded.value_into(&mut value).map_err(|e| format!("{e}."))?;
    Ok(value)
}
