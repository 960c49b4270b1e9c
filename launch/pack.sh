# shellcheck shell=bash
# Sourced by tpu.sh: what is sent to the workers. `revision` names the source tree as it stands, `pack
# DIRECTORY` makes DIRECTORY/gtalign.tar.gz of it, `write_env NAME …` prints the variables to pass on.

files() { # the source tree as git sees it, uncommitted work included; all files where there is no git
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files --cached --others --exclude-standard
  else
    find . -type f -not -path './.venv/*' -not -path './runs/*' -not -path '*/__pycache__/*'
  fi | while IFS= read -r file; do
    [[ ! -f "$file" ]] || printf '%s\n' "${file#./}"
  done | LC_ALL=C sort
}

revision() { # of what the files hold
  local digest=(sha256sum)
  command -v sha256sum >/dev/null || digest=(shasum -a 256)
  files | tr '\n' '\0' | xargs -0 "${digest[@]}" | "${digest[@]}" | cut -c1-12
}

write_env() { # quoted for a shell; $@: more of them
  local variable
  for variable in $(compgen -e | grep -E '^(GTALIGN_[A-Z0-9_]+|OPENAI_API_KEY|HF_TOKEN)$' |
    grep -vE '^GTALIGN_(COORDINATOR|PROCESS_)' || true) "$@"; do
    [[ -n "${!variable+set}" ]] || fail "--env=$variable: there is no such variable here"
    printf 'export %s=%q\n' "$variable" "${!variable}"
  done
}

pack() {
  # shellcheck disable=SC2154  # of tpu.sh
  if [[ -z "$dry_run" ]]; then
    (umask 077 && mkdir -p "$1") && files >"$1/files" || return 1
  fi
  COPYFILE_DISABLE=1 execute tar -czf "$1/gtalign.tar.gz" -T "$1/files"
}
