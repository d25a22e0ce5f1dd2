"""What each shell runs to complete ``lora-merge``. click fills in ``complete_func``, ``complete_var`` and ``prog_name``."""

from __future__ import annotations

from typing import Final

_BASH: Final = r"""# Completion of %(prog_name)s in bash. In ~/.bashrc:
#   eval "$(%(prog_name)s completion bash)"
%(complete_func)s() {
    local line=${COMP_LINE:0:COMP_POINT} current=$2 prefix= kind value help
    local written=${line##*[[:space:]]}
    COMPREPLY=()
    [[ $current == "=" ]] && current=
    # bash breaks words at = and : unless COMP_WORDBREAKS was changed.
    if [[ $COMP_WORDBREAKS != *=* && $current == --*=* ]]; then
        prefix=${current%%%%=*}=
        current=${current#*=}
    fi
    while IFS=$'\t' read -r kind value help; do
        case $kind in
            dir | file)
                compopt -o filenames 2>/dev/null
                while IFS= read -r value; do
                    COMPREPLY+=("$prefix$value")
                done < <(compgen "-${kind:0:1}" -- "$current")
                ;;
            plain) COMPREPLY+=("$prefix$value") ;;
        esac
    done < <(COMP_LINE=$line %(complete_var)s=bash_complete "$1" 2>/dev/null)
    [[ $written == --*=* ]] && written=${written#*=}
    if [[ $COMP_WORDBREAKS == *:* && $written == *:* ]]; then
        value=${written%%"${written##*:}"}
        COMPREPLY=("${COMPREPLY[@]#"$value"}")
    fi
}
complete -o nosort -F %(complete_func)s %(prog_name)s 2>/dev/null || complete -F %(complete_func)s %(prog_name)s
"""

_ZSH: Final = r"""#compdef %(prog_name)s
# Completion of %(prog_name)s in zsh. In ~/.zshrc:
#   eval "$(%(prog_name)s completion zsh)"
%(complete_func)s() {
    local kind value help line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    local -a offers kinds
    while IFS=$'\t' read -r kind value help; do
        case $kind in
            dir | file) kinds+=($kind) ;;
            plain) offers+=("${value//:/\\:}${help:+:$help}") ;;
        esac
    done < <(COMP_LINE=$line %(complete_var)s=zsh_complete $words[1] 2>/dev/null)
    [[ $PREFIX == --*=* ]] && compset -P 1 '*='
    (( $#offers )) && _describe -V value offers
    [[ -n ${kinds[(r)dir]} ]] && _path_files -/
    [[ -n ${kinds[(r)file]} ]] && _path_files -f
    return 0
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef %(complete_func)s %(prog_name)s
fi
"""

_FISH: Final = r"""# Completion of %(prog_name)s in fish. In ~/.config/fish/config.fish:
#   %(prog_name)s completion fish | source
function %(complete_func)s
    set -l written (commandline -ct)
    set -l prefix ''
    if string match -qr '^--[^=]+=' -- $written
        set prefix (string replace -r '=.*' '=' -- $written)
        set written (string replace -r '^[^=]*=' '' -- $written)
    end
    set -l line (commandline -cp | string collect)
    set -l program (commandline -po)[1]
    for offer in (COMP_LINE=$line %(complete_var)s=fish_complete $program 2>/dev/null)
        set -l parts (string split -m 2 \t -- $offer)
        switch $parts[1]
            case dir
                printf "$prefix%%s\n" (__fish_complete_directories $written '')
            case file
                printf "$prefix%%s\n" (__fish_complete_path $written)
            case plain
                printf '%%s%%s\t%%s\n' $prefix $parts[2] $parts[3]
        end
    end
end
complete -c %(prog_name)s -f -a '(%(complete_func)s)'
"""

SCRIPTS: Final = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
