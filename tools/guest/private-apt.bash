# Sourced by tools/fetch-qemu10 and tools/build-guest: fetch Debian packages without installing any.
#
# Every file apt writes lives in a directory of ours, so a normal user can run it and the machine's
# package state stays as it is. The archive, its keys, proxies and credentials are the machine's own:
# only the suite of its Debian source is replaced.

die() {
  echo "${0##*/}: error: $*" >&2
  exit 1
}

need_commands() {
  # need_commands COMMAND=PACKAGE ... : one line that names everything that is missing.
  local pair missing=()
  for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || missing+=("${pair##*=}")
  done
  ((${#missing[@]} == 0)) || die "missing on this machine: Debian packages ${missing[*]} (apt-get install ${missing[*]})"
}

hold_lock() {
  # hold_lock FILE : until this shell ends; a second run waits here and then finds the work done.
  mkdir -p "$(dirname "$1")" || die "cannot write to $(dirname "$1")"
  { exec {PRIVATE_APT_LOCK}>"$1"; } 2>/dev/null || die "cannot write $1"
  flock "$PRIVATE_APT_LOCK" || die "cannot lock $1"
}

_machine_suites() {
  # What the machine may call the suite of its main Debian archive.
  local codename
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  echo "$codename bookworm oldoldstable oldstable stable testing unstable sid"
}

_sources_from_deb822() {
  # Print the first enabled "deb" stanza of the main archive in file $1 with its suites replaced by $2.
  awk -v RS= -v FS='\n' -v wanted="$(_machine_suites)" -v suites="$2" '
    BEGIN { count = split(wanted, list, " "); for (i = 1; i <= count; i++) known[list[i]] = 1 }
    {
      kept = ""; binary = main = 0; off = 0; field = ""
      for (i = 1; i <= NF; i++) {
        if ($i ~ /^#/) continue
        value = $i
        if ($i ~ /^[^ \t]/) {
          field = tolower($i); sub(/[ \t]*:.*/, "", field)
          sub(/^[^:]*:/, "", value)
        }
        words = split(value, word, /[ \t]+/)
        for (w = 1; w <= words; w++) {
          if (field == "types" && word[w] == "deb") binary = 1
          if (field == "suites" && word[w] in known) main = 1
          if (field == "enabled" && tolower(word[w]) ~ /^(no|false|0)$/) off = 1
        }
        if (field != "types" && field != "suites" && field != "components") kept = kept $i "\n"
      }
      if (binary && main && !off) {
        printf "Types: deb\nSuites: %s\nComponents: main\n%s", suites, kept
        exit
      }
    }' "$1"
}

_sources_from_list() {
  # The same for the one-line format: "deb [options] URI SUITE COMPONENT...".
  awk -v wanted="$(_machine_suites)" -v suites="$2" '
    BEGIN { count = split(wanted, list, " "); for (i = 1; i <= count; i++) known[list[i]] = 1 }
    $1 == "deb" {
      options = ""; rest = $0; sub(/^deb[ \t]+/, "", rest)
      if (match(rest, /^\[[^]]*\][ \t]*/)) {
        options = substr(rest, 1, RLENGTH) " "; rest = substr(rest, RLENGTH + 1)
      }
      split(rest, word, /[ \t]+/)
      if (word[2] in known) {
        count = split(suites, list, " ")
        for (i = 1; i <= count; i++) printf "deb %s%s %s main\n", options, word[1], list[i]
        exit
      }
    }' "$1"
}

_write_sources() {
  # _write_sources DIR SUITES : leave exactly one of DIR/sources.sources, DIR/sources.list behind.
  local dir=$1 suites=$2 file text
  rm -f "$dir/sources.sources" "$dir/sources.list"
  for file in /etc/apt/sources.list.d/*.sources; do
    [[ -r $file ]] || continue
    text=$(_sources_from_deb822 "$file" "$suites")
    [[ -z $text ]] || { printf '%s\n' "$text" >"$dir/sources.sources"; return; }
  done
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [[ -r $file ]] || continue
    text=$(_sources_from_list "$file" "$suites")
    [[ -z $text ]] || { printf '%s\n' "$text" >"$dir/sources.list"; return; }
  done
  die "no source of the main Debian archive found in /etc/apt/sources.list or /etc/apt/sources.list.d"
}

private_apt_setup() {
  # private_apt_setup DIR SUITES [FORGET_REGEX] : prepare DIR; packages that match FORGET_REGEX count as not installed.
  local dir=$1 suites=$2 forget=${3:-}
  need_commands apt-get=apt dpkg-deb=dpkg awk=mawk flock=util-linux
  mkdir -p "$dir"/{lists,archives}/partial "$dir/etc" || die "cannot write to $dir"
  _write_sources "$dir/etc" "$suites"
  awk -v RS= -v ORS='\n\n' -v forget="${forget:-^$}" '
    { name = $0; sub(/\n.*/, "", name); sub(/^Package: /, "", name) }
    name !~ forget' /var/lib/dpkg/status >"$dir/status" || die "cannot read /var/lib/dpkg/status"
  # Read after the machine's own configuration (-c), so hooks that clean its caches do not run on ours.
  cat >"$dir/apt.conf" <<CONF
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
#clear Dir::Etc::sourceparts;
Dir::State "$dir";
Dir::State::lists "$dir/lists";
Dir::State::status "$dir/status";
Dir::State::extended_states "$dir/extended_states";
Dir::Cache "$dir";
Dir::Cache::archives "$dir/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "$(echo "$dir"/etc/sources.*)";
Dir::Etc::sourceparts "-";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Log "$dir";
Acquire::Languages "none";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "root";
CONF
  PRIVATE_APT_DIR=$dir
}

private_apt() {
  # private_apt PROGRAM ARGUMENT... : run an apt program on the private directory, quiet unless it fails.
  local log=$PRIVATE_APT_DIR/apt.log
  local program=$1
  shift
  "$program" -c "$PRIVATE_APT_DIR/apt.conf" "$@" 2>"$log" || {
    local status=$?
    grep -E '^(E|W):' "$log" | head -n 4 >&2
    return "$status"
  }
}

private_apt_update() {
  private_apt apt-get -qq update >/dev/null || die "cannot read the package lists of $1 (network? suite gone from the archive?)"
}
