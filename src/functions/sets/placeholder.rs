//! The member's name in a query of training data.
//!
//! Responsible for: putting a literal in the place of each `$1` of a statement, with PostgreSQL's lexical rules: not in
//! strings, quoted names, dollar quotes and comments.

/// The query with `literal` for each `$1`. None if it has another parameter, or ends within a string or a comment.
pub fn fill(query: &str, literal: &str) -> Option<String> {
    let mut out = String::with_capacity(query.len() + literal.len());
    let mut rest = query;
    // Whether what came last may be the end of a name, behind which a dollar sign belongs to it.
    let mut in_word = false;
    while let Some(next) = rest.chars().next() {
        let len = if rest.starts_with("--") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            comment(rest)?
        } else if next == '\'' {
            let escapes = in_word && out.ends_with(['e', 'E']) && !out[..out.len() - 1].ends_with(is_word);
            quoted(rest, '\'', escapes)?
        } else if next == '"' {
            quoted(rest, '"', false)?
        } else if next == '$' && !in_word {
            let digits = rest[1..].bytes().take_while(u8::is_ascii_digit).count();
            if digits > 0 {
                if &rest[1..=digits] != "1" {
                    return None;
                }
                // Apart from its neighbours, whatever they are.
                out.push(' ');
                out.push_str(literal);
                out.push(' ');
                rest = &rest[2..];
                continue;
            }
            dollar_quoted(rest).unwrap_or(Some(1))?
        } else {
            next.len_utf8()
        };
        in_word = len == next.len_utf8() && is_word(next);
        out.push_str(&rest[..len]);
        rest = &rest[len..];
    }
    Some(out)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '$' || !c.is_ascii()
}

/// Bytes of a comment, which may contain others. None if it does not end.
fn comment(text: &str) -> Option<usize> {
    let (mut depth, mut at) = (0usize, 0);
    loop {
        let rest = text.as_bytes().get(at..)?;
        if rest.starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest.starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return Some(at);
            }
        } else if rest.is_empty() {
            return None;
        } else {
            at += 1;
        }
    }
}

/// Bytes of a string or a quoted name. None if it does not end.
fn quoted(text: &str, quote: char, escapes: bool) -> Option<usize> {
    let (bytes, quote) = (text.as_bytes(), quote as u8);
    let mut at = 1;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\\' if escapes => at += 2,
            _ if byte == quote && bytes.get(at + 1) == Some(&quote) => at += 2,
            _ if byte == quote => return Some(at + 1),
            _ => at += 1,
        }
    }
    None
}

/// Bytes of a dollar-quoted string: none if it is no such string, `Some(None)` if it does not end.
fn dollar_quoted(text: &str) -> Option<Option<usize>> {
    let tag_len = text[1..].find('$')?;
    let tag = &text[..tag_len + 2];
    let name = &tag[1..tag.len() - 1];
    if !name.chars().all(|c| is_word(c) && c != '$') || name.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    Some(text[tag.len()..].find(tag).map(|end| end + 2 * tag.len()))
}

#[cfg(test)]
mod tests {
    use super::fill;

    #[test]
    fn names_are_filled_in_where_parameters_stand() {
        for (query, filled) in [
            ("SELECT x FROM d WHERE c = $1", "SELECT x FROM d WHERE c =  'm' "),
            ("SELECT $1||$1", "SELECT  'm' || 'm' "),
            ("SELECT '$1', \"$1\", $1", "SELECT '$1', \"$1\",  'm' "),
            ("SELECT 'it''s $1' -- $1\n, $1", "SELECT 'it''s $1' -- $1\n,  'm' "),
            ("SELECT E'\\'$1' /* $1 /* $1 */ $1 */ , $1", "SELECT E'\\'$1' /* $1 /* $1 */ $1 */ ,  'm' "),
            ("SELECT $$ $1 $$, $t$ $1 $$ $t$, $1", "SELECT $$ $1 $$, $t$ $1 $$ $t$,  'm' "),
            ("SELECT a$1, ä$1 FROM t", "SELECT a$1, ä$1 FROM t"),
            ("SELECT name'$1'", "SELECT name'$1'"),
            ("SELECT typE'\\', $1", "SELECT typE'\\',  'm' "),
            ("SELECT 1", "SELECT 1"),
        ] {
            assert_eq!(fill(query, "'m'").as_deref(), Some(filled), "{query}");
        }
    }

    #[test]
    fn what_cannot_be_filled_is_told() {
        for query in ["SELECT $2", "SELECT $11", "SELECT 'a", "SELECT \"a", "/* /* */ $1", "$a$ $1", "SELECT E'\\'"] {
            assert_eq!(fill(query, "'m'"), None, "{query}");
        }
    }
}
