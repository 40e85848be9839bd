//! Sizes on the command line: a number with an optional suffix, powers of 1024.

/// Reads `4096`, `512M`, `1g`, `2TiB`: bytes, or K, M, G, T times powers of 1024 (`iB` may follow).
///
/// # Errors
/// A sentence for the user if the text is no such size, is zero, or no multiple of 4096.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a size; write a whole number such as 512M or 1G"))?;
    let lower = suffix.to_ascii_lowercase();
    let unit = match lower.strip_suffix("ib").unwrap_or(&lower) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("`{suffix}` is not a unit of size; use K, M, G or T")),
    };
    let bytes = number
        .checked_mul(1 << unit)
        .filter(|&bytes| bytes < 1 << 60)
        .ok_or_else(|| format!("`{text}` is too large"))?;
    if bytes == 0 || !bytes.is_multiple_of(4096) {
        return Err(format!("`{text}` is not a multiple of 4096 bytes above zero"));
    }
    Ok(bytes)
}

/// `bytes` for people: the largest unit that divides it, else one decimal.
pub fn show(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >= 1 << (10 * (unit + 1)) {
        unit += 1;
    }
    let scale = 1_u64 << (10 * unit);
    if bytes.is_multiple_of(scale) {
        return format!("{} {}", bytes / scale, UNITS[unit]);
    }
    let tenths = u128::from(bytes) * 10 / u128::from(scale);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("4k"), Ok(4096));
        assert_eq!(parse("512M"), Ok(536_870_912));
        assert_eq!(parse("1g"), Ok(1_073_741_824));
        assert_eq!(parse("1GiB"), Ok(1_073_741_824));
        assert_eq!(parse("4T"), Ok(4_398_046_511_104));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "-1", "1.5G", "1X", "1B", "0", "1000", "99999999T", "1 G"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_fits() {
        assert_eq!(show(4096), "4 KiB");
        assert_eq!(show(1 << 30), "1 GiB");
        assert_eq!(show(3 << 29), "1.5 GiB");
        assert_eq!(show(7), "7 B");
    }
}
